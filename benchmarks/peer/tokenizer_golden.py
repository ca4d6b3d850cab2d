"""Writes tests/golden/tokenizer: what llama.cpp makes of many strings, for our tokenizers to be compared with.

    python benchmarks/peer/tokenizer_golden.py --smollm data/models/SmolLM2-135M-Instruct.Q4_1.gguf \
        --gemma data/models/gemma-3-270m-q4_k_m.gguf --qwen data/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

needs llama-cpp-python, gguf and tokenizers. Besides the three models it asks about small vocabularies made here, so that
every pre-tokenizer, and SentencePiece with its options, can be checked without a model.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gzip
import hashlib
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import tokenizers
from llama_cpp import llama_cpp as lib

OUT = Path(__file__).parents[2] / "tests" / "golden" / "tokenizer"

_NAMES = (
    "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4 jina-es jina-de "
    "jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe smollm starcoder refact command-r codeshell exaone "
    "minerva-7b mellum2 llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "glm4 chatglm-bpe jais-2 minicpm5 qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2 "
    "qwen35 tekken gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m tiny_aya cohere2moe youtu kimi-k2 "
    "exaone-moe ufakzeka laguna chameleon bailingmoe bailingmoe2 llada-moe seed-coder deepseek-llm deepseek-coder "
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4 afmoe bloom gpt3-finnish poro-chat viking superbpe falcon default"
)
PRE_TOKENIZERS = tuple(_NAMES.split())

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "It's what we've always said: they're fine, I'd say, and she'll agree; we'RE NOT, I'M SURE, 'tis so.",
    "don't 'DON'T' can't've ''s 's 'S 'ſ ' t 'll 'LL 'lL",
    "  leading and trailing  ",
    "one two  three   four    five     six",
    "a  . b  , c   ! d  ~ e  ` f  + g  < h  $ i  - j  ( k  _ l  \\ m  ^ n  | o",
    "tab\tseparated\t\tvalues\t\t\there",
    "line\nfeeds\n\nand\n\n\nmore\n\n\n\n",
    "carriage\r\nreturns\r\n\r\nand\rlone\r\r",
    "mixed \n \n\t\n  \r\n trailing \t ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n",
    "\n ",
    "x\n\n  y",
    "x  \n",
    " " * 40,
    " " * 33 + "x",
    "\n" * 40,
    "\t" * 35 + "end",
    "a" * 60,
    "ab" * 40,
    "aaa bbb aaa" * 5,
    "!" * 50,
    "=" * 70 + "\n" + "-" * 70,
    "0123456789",
    "1 12 123 1234 12345 123456 1234567",
    "3.14159 2,718,281 1e-9 0x1F 0b1011 ½ ² Ⅷ ٣٤٥ १२३ ৪৫৬ 一二三",
    "2024-02-30T25:61:00Z +1 (555) 010-9999 192.168.0.1:8080",
    "$9.99 €1 £2 ¥300 ₹40 50% 10‰ #7 @home user+tag@example.org",
    "https://example.org/a/b?c=d&e=f#g file:///tmp/x~y",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case mIxEd XMLHttpRequest",
    "ALLCAPS lower Title tITLE ǅ ǲ İı ß ẞ ŉ",
    "(a) [b] {c} <d> «e» “f” ‘g’ „h‟ 「i」 【j】",
    "a_b __init__ a__b _ __ ___",
    "`code` ``code`` ```block``` ~~struck~~ ^up^ |bar|",
    "...and… then?! ?? !! ‽ -- – — ―",
    "def f(x: int) -> int:\n    if x < 2:\n        return x\n    return f(x - 1) + f(x - 2)  # slow\n",
    'for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; } printf("%d\\n", sum);',
    "fn main() {\n\tlet v: Vec<&'static str> = vec![\"a\"; 3];\n\tprintln!(\"{v:?}\");\n}\n",
    "SELECT name, COUNT(*) FROM people WHERE age >= 18 GROUP BY name HAVING COUNT(*) > 1;",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9\\n"}}',
    '<div class="row"><p>text &amp; more</p><br/></div><!-- comment -->',
    "const add = (a, b) => a + b; // ES6\nexport default { add };",
    "#!/bin/sh\nset -eu\nfor f in *.txt; do echo \"$f: $(wc -l < \"$f\")\"; done | sort -k2 -n\n",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑ᵢ αᵢ² ≤ 1, ∂f/∂x ≠ 0, A⊗B, x→∞",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "- item\n  - nested\n    1. numbered\n> quote\n",
    "Grüße aus Köln, schöne Straßen, Öl und Übermut.",
    "L'été, où êtes-vous ? Ça coûte 3,50 € à Noël, cœur naïf.",
    "El niño comió piñas; ¿qué más? ¡Sí, señor!",
    "Zażółć gęślą jaźń; příliš žluťoučký kůň; őrült űrhajó.",
    "Съешь же ещё этих мягких булок. Її ґанок. Њ љ џ ѣ",
    "Η γρήγορη αλεπού: ἄνθρωπος, Ἀθῆναι, ϕ ϑ",
    "שלום עולם, מה שלומך? בְּרֵאשִׁית",
    "مرحبا بالعالم، كيف حالك؟ الْعَرَبِيَّةُ ۱۲۳",
    "नमस्ते दुनिया, क्षत्रिय, हिन्दी में लिखा।",
    "বাংলা ভাষা, স্ত্রী, কৃষ্ণ।",
    "தமிழ் மொழி; ఆంధ్ర తెలుగు; ಕನ್ನಡ; മലയാളം; සිංහල",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "ລາວ ភាសាខ្មែរ မြန်မာဘာသာ བོད་ཡིག",
    "你好，世界！今天天气很好。漢字與简体字。",
    "日本語のテスト：ひらがな、カタカナ、漢字、ﾊﾝｶｸ、ＺＥＮＫＡＫＵ１２３。",
    "안녕하세요 세계, 한국어 테스트입니다. ㄱㄴㄷ",
    "Tiếng Việt: đường phố Hà Nội đẹp lắm.",
    "Ünïcödé c\u0327o\u0302m\u0301b\u0308i\u0303ned e\u0301 vs é, n\u0303 vs ñ, q\u0307\u0323",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "emoji 😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☺ 1️⃣ #️⃣ 🧑‍💻",
    "😀😀😀😀 🤷‍♀️🤷‍♂️ \U0001faf8 \U0001fae0",
    "\u200bzero\u200bwidth\u200c\u200d\u2060\ufeff",
    "no\u00a0break\u2003em\u2009thin\u3000ideographic\u1680ogham\u2028line\u2029para\u0085next",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "\x00nul\x00 \x01\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x0f",
    "\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x7f\x80\x81\x9f",
    "!\x04! a\x06b \x13\x14\x16 1\x1d2",
    "\ufffd \ufffe \uffff \ue000 \uf8ff \U000f0000 \U0010ffff",
    "\U00010348 \U0001d11e \U00020000 \U0002f800 \U000e0041 \U00031350 \U0002ebf0 \u31ef",
    "𝓯𝓪𝓷𝓬𝔂 𝕋𝕖𝕩𝕥 ⓒⓘⓡⓒⓛⓔ ﬁ ﬂ ㎏ ㍿",
    "▁ ▁▁ a▁b ▁a▁ >▁</ > </",
    "<0x41><0x0A> <0x41 0x41>",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>",
    "<|endoftext|><|endoftext|>x<|endoftext|>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<bos><eos><pad><unk><mask>[multimodal]<unused0><unused6241>",
    "<s>[INST] hi [/INST] there</s>",
    "<|im_end|", "|im_end|>", "<|im_<|im_end|>end|>", " <|im_end|> ", "\n<|im_end|>\n",
    "<table><tr><td>1</td></tr></table> <h1>t</h1> <b>b</b> <i>i</i> </s> <s>",
    "<reponame>repo<filename>a.py<gh_stars>0<file_sep>x<issue_start>",
    "<start_of_image><end_of_image>",
    "<|a|> <|b|> <ud> <ud><ud> x<ud>y <|a|>  text <|a|>\n\ttext <ab> <abc> <abcd <abc<ab>>",
    "Once upon a time, in a small village by the sea, there lived a clockmaker who mended more than clocks.",
    "Question: If a train leaves at 3:15 pm and travels 240 km at 80 km/h, when does it arrive? Answer: 6:15 pm.",
]  # fmt: skip

WORDS = [word.strip(".,;:!?") for text in TEXTS if text.isascii() for word in text.split() if word.isalpha()]


def strings() -> list[str]:
    """The hand-written texts, every ASCII character alone, and random ones of several kinds."""
    rng = random.Random(20240607)
    blocks = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF)]
    blocks += [(0x1E00, 0x206F), (0x20A0, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
    blocks += [(0xFE00, 0xFFFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2FFFF)]
    result = TEXTS + [chr(code) for code in range(128)]
    for _ in range(30):
        result.append("".join(chr(rng.randint(0x20, 0x7E)) for _ in range(rng.randint(1, 60))))
    for _ in range(30):
        result.append("".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 30))))
    for _ in range(20):
        codes = (rng.choice((rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF))) for _ in range(rng.randint(1, 20)))
        result.append("".join(map(chr, codes)))
    for _ in range(20):
        result.append("".join(rng.choice(" \t\n\r\u00a0\u3000ab1!'s") for _ in range(rng.randint(1, 50))))
    for _ in range(12):
        words = (
            rng.choice((rng.choice(WORDS), rng.choice(WORDS).title(), str(rng.randint(0, 9999)))) for _ in range(25)
        )
        result.append(rng.choice((" ", ", ", "\n")).join(words) + ".")
    for _ in range(12):
        result.append("".join(rng.choice("abAB<|>/ _▁") for _ in range(rng.randint(5, 60))))
    return list(dict.fromkeys(result))


def further_strings() -> list[str]:
    """What pre-tokenizers differ in: runs of digits and blanks of every length, scripts side by side, marks, long texts."""
    rng = random.Random(20261130)
    han = [chr(code) for code in (0x3400, 0x4DBF, 0x4E00, 0x9FA5, 0x9FFF, 0xF900, 0x20000, 0x2A6DF, 0x2B740, 0x2F800)]
    parts = (
        *(
            "Word",
            "words",
            "WORD",
            "ΑΒΓ",
            "αβγ",
            "Жук",
            "שלום",
            "مرحبا",
            "हिन्दी",
            "क्ष",
            "ไทย",
            "한국어",
            "ㄱㄴ",
            "日本",
            "カナ",
        ),
        *(
            "かな",
            "ㄅㄆ",
            "ﾊﾝ",
            "e\u0301",
            "n\u0303o",
            "\u0301",
            "👩‍👩‍👧",
            "🏳️‍🌈",
            "1️⃣",
            "'s",
            "'LL",
            "’s",
            "I'm",
            "d'été",
            "'\u017f",
        ),
        *(
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\n\n",
            " \n ",
            "\u00a0",
            "\u3000",
            ".",
            ",",
            "...",
            "!?",
            "(",
            ")",
            "/",
            "//",
            "<|im_end|>",
        ),
        *(
            "12",
            "123",
            "1234",
            "٣٤٥",
            "१२३",
            "½",
            "Ⅷ",
            "！",
            "，",
            "。",
            "…",
            "“",
            "”",
            "~~",
            "$€",
            "|",
            "`",
            "_",
            "-",
            "–",
            "\x07",
        ),
        *("<sentinel:12>", "IMGIMGABZ", "IMGIMGABCDEZ", "\ue000", "\U0010fffd", *han),
    )
    result = [
        before + "7" * count + after for count in range(1, 14) for before, after in (("", ""), ("a", " b"), (" ", "."))
    ]
    result += [
        before + " " * count + after
        for count in (3, 5, 9, 17, 33, 70, 140, 300, 600)
        for before, after in ("ab", ("", "\n"))
    ]
    result += ["\n" * count + "x" for count in (2, 3, 9)] + ["\r" * 5, "\r\n" * 4 + "y", "\t\t\tz"]
    result += [left + right for left, right in itertools.pairwise(parts)]
    result += ["".join(rng.choices(parts, k=rng.randint(3, 14))) for _ in range(150)]
    result += ["".join(rng.choices(parts, k=400)), "字" * 600, "9" * 601, "ab1 " * 300, "fooBarBAZ " * 40, " " * 700]
    return list(dict.fromkeys(result))


@lib.llama_log_callback
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


class PeerTokenizer:
    """The tokenizer of a GGUF file, as llama.cpp reads it."""

    def __init__(self, path: Path) -> None:
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.size = lib.llama_vocab_n_tokens(self._vocab)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = 3 * len(data) + 8  # a space may become the three bytes of its sign
        buffer = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, parse_special)
        assert count >= 0
        return buffer[:count]

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        count = lib.llama_token_to_piece(self._vocab, token, buffer, 1024, 0, True)
        assert count >= 0
        return buffer.raw[:count]

    def decode(self, ids: list[int]) -> str:
        buffer = ctypes.create_string_buffer(1 << 16)
        tokens = (lib.llama_token * len(ids))(*ids)
        count = lib.llama_detokenize(self._vocab, tokens, len(ids), buffer, 1 << 16, False, True)
        assert count >= 0
        return buffer.raw[:count].decode("utf-8", "replace")

    def end_ids(self) -> list[int]:
        return [token for token in range(self.size) if lib.llama_vocab_is_eog(self._vocab, token)]

    def facts(self, texts: list[str]) -> dict[str, Any]:
        """All that a test compares."""
        pieces = hashlib.sha256()
        for token in range(self.size):
            piece = self.piece(token)
            pieces.update(len(piece).to_bytes(4, "little") + piece)
        return {
            "plain": [self.encode(text, add_special=False, parse_special=False) for text in texts],
            "special": [self.encode(text, add_special=True, parse_special=True) for text in texts],
            "pieces_sha256": pieces.hexdigest(),
            "end_ids": self.end_ids(),
        }


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file without tensors that llama.cpp accepts when it is asked for the vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(metadata["tokenizer.ggml.tokens"]))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(metadata: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path, metadata)
        peer = PeerTokenizer(path)
        decoded = [peer.decode(peer.encode(text, add_special=False, parse_special=False)) for text in texts]
        return {**peer.facts(texts), "decoded": decoded}


def trained_merges(texts: list[str], count: int, *, byte_level: bool) -> list[tuple[str, str]]:
    """BPE merges of whole texts: that they cross the words of every pre-tokenizer is what makes its cuts visible."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = 256 if byte_level else len(set("".join(texts)))
    if byte_level:
        engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=count + alphabet, show_progress=False, max_token_length=8)
    engine.train_from_iterator(texts, trainer)
    merges = json.loads(engine.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges if " " not in left + right]


def byte_level_metadata(texts: list[str]) -> dict[str, Any]:
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    crossing = ["WordwordsWORDwordsWord", "fooBarBAZfooBAR", " " * 64, "a" + " " * 8 + "b", "\n" * 8, "\t" * 8]
    merges = trained_merges([*texts, *further_strings(), *crossing * 20], 1200, byte_level=True)
    tokens = list(dict.fromkeys([*sorted(alphabet), *("".join(pair) for pair in merges), "<|endoftext|>", "<ud>"]))
    types = [gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


def sentencepiece_metadata(texts: list[str]) -> dict[str, Any]:
    """Some characters are left out, so that they need bytes or merge without being tokens."""
    escaped = [text.replace(" ", "▁") for text in texts]
    merges = trained_merges(escaped, 800, byte_level=False)
    special = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|a|>": 3, "<|b|>": 3, "<|endoftext|>": 3}
    special |= {"<ud>": 4, "<ab>": 4, "<abc": 4, "▁▁▁": 4, "\n\n": 4}
    # llama.cpp merges "</" and "s>" into a control token, and cuts texts short at a NUL: what leads there is left out.
    hidden = [text for text, kind in special.items() if kind != gguf.TokenType.USER_DEFINED]
    left_out = {
        half for text in hidden for cut in range(len(text)) for half in (text[:cut], text[cut:])
    } | special.keys()
    pieces = dict.fromkeys(text for text in map("".join, merges) if text not in left_out and "\0" not in text)
    counts = collections.Counter("".join(escaped))
    chars = [char for char, _ in counts.most_common(300) if char not in pieces and char not in "zqé日\0\n\t"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *bytes_, *pieces, *chars]
    ranks = [-float(rank) for rank in range(1, len(pieces) + 1)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*special.values(), *[6] * 256, *[1] * (len(pieces) + len(chars))],
        "tokenizer.ggml.scores": [*[0.0] * (len(special) + 256), *ranks, *[-1e4] * len(chars)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def save(name: str, data: dict[str, Any]) -> None:
    data = {"peer": f"llama-cpp-python {llama_cpp.__version__}", **data}
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json.gz"
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")) + "\n"
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{path.name}: {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm", type=Path, required=True)
    parser.add_argument("--gemma", type=Path, required=True)
    parser.add_argument("--qwen", type=Path, required=True)
    arguments = parser.parse_args()
    lib.llama_log_set(_silent, ctypes.c_void_p(0))
    lib.llama_backend_init()

    texts = strings()
    save("strings", {"strings": texts})
    for name, path in (("smollm2", arguments.smollm), ("gemma3", arguments.gemma), ("qwen2", arguments.qwen)):
        save(name, PeerTokenizer(path).facts(texts))

    longer = [text for text in texts if len(text) > 1]
    metadata = byte_level_metadata(longer)
    asked = [text for text in [*texts, *further_strings()] if len(text) > 1]
    by_name: dict[str, Any] = {}
    for pre in PRE_TOKENIZERS:
        ids = ask({**metadata, "tokenizer.ggml.pre": pre}, asked)["plain"]
        by_name[pre] = next((name for name, other in by_name.items() if other == ids), ids)
    save("pretokenizers", {"metadata": metadata, "strings": asked, "plain": by_name})

    metadata = sentencepiece_metadata(longer)
    tied = [score if score == -1e4 else score // 3 for score in metadata["tokenizer.ggml.scores"]]
    cases = {}
    for name, extra in (
        ("plain", {}),
        ("ties", {"tokenizer.ggml.scores": tied, "tokenizer.ggml.add_space_prefix": False}),
        ("phi", {"general.name": "Phi-3 mini", "tokenizer.ggml.add_eos_token": True}),
    ):
        cases[name] = {**ask({**metadata, **extra}, texts[::2]), "metadata": extra}
    save("sentencepiece", {"metadata": metadata, "cases": cases})


if __name__ == "__main__":
    main()
