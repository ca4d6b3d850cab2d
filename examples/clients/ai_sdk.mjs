// Vercel's AI SDK: an answer as it comes, and an object that follows a schema.
//
//     npm install ai @ai-sdk/openai-compatible zod
//     node examples/clients/ai_sdk.mjs [URL]

import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { Output, generateText, streamText } from 'ai'
import { z } from 'zod'

const atlas = createOpenAICompatible({
  name: 'atlas-jax',
  baseURL: `${process.argv[2] ?? 'http://127.0.0.1:8080'}/v1`,
  headers: { 'X-Session-ID': 'ai-sdk-example' },
  supportsStructuredOutputs: true
})

for await (const piece of streamText({ model: atlas('any'), prompt: 'Name three rivers.' }).textStream) {
  process.stdout.write(piece)
}
const River = z.object({ name: z.string(), length_km: z.number().int() })
const { output } = await generateText({
  model: atlas('any'), prompt: 'Describe the Danube.', output: Output.object({ schema: River })
})
console.log('\n', output)
