"""LlamaIndex: answers from documents, embedded and answered by the same server.

    pip install llama-index-core llama-index-llms-openai-like llama-index-embeddings-openai-like
    python examples/clients/llamaindex_search.py [URL]

A chat model's embeddings tell topics apart and not much more; a server of an embedding model is better for search.
"""

import sys

from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
server = {"api_base": f"{url}/v1", "api_key": "none"}
documents = [Document(text="The Danube is 2850 km long."), Document(text="Rust was begun by Graydon Hoare.")]
index = VectorStoreIndex.from_documents(documents, embed_model=OpenAILikeEmbedding(model_name="any", **server))
model = OpenAILike(model="any", is_chat_model=True, context_window=8192, **server)
print(index.as_query_engine(llm=model, similarity_top_k=1).query("How long is the Danube?"))
