// Vercel's AI SDK, through its provider for compatible servers, and Anthropic's.

import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { createAnthropic } from '@ai-sdk/anthropic'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { APICallError, Output, embedMany, generateText, stepCountIs, streamText, tool } from 'ai'
import { z } from 'zod'
import { LONG, call, example, program, run, servers } from './flows.mjs'

const River = z.object({ name: z.string(), length_km: z.number().int() })
const weather = tool({
  description: 'The weather of a city',
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `Rain, 4 degrees in ${city}`
})
const compatible = (url, options = {}) => createOpenAICompatible({ name: 'atlas', baseURL: `${url}/v1`, ...options })
const models = {
  compatible: url => compatible(url)('any'),
  'compatible, by schema': url => compatible(url, { supportsStructuredOutputs: true })('any'),
  anthropic: url => createAnthropic({ baseURL: `${url}/v1`, apiKey: 'none' })('claude-haiku-4-5')
}
const flows = {}
for (const [name, make] of Object.entries(models)) {
  flows[`chat: ${name}`] = async () => {
    const { text, usage } = await generateText({ model: make(servers.url), system: 'You are brief.', prompt: 'Name a river.' })
    assert(text)
    assert(usage.outputTokens > 0)
  }
  flows[`stream: ${name}`] = async () => {
    let text = ''
    for await (const piece of streamText({ model: make(servers.url), prompt: 'Name a river.' }).textStream) text += piece
    assert(text)
  }
  flows[`tools: ${name}`] = async () => {
    await servers.script(call('weather', { city: 'Vienna' }), 'It rains.')
    const { text } = await generateText({
      model: make(servers.scripted), prompt: 'The weather in Vienna?', tools: { weather }, stopWhen: stepCountIs(3)
    })
    assert.equal(text, 'It rains.')
    assert((await servers.asked()).includes('Rain, 4 degrees in Vienna'))
  }
  flows[`tools: ${name}, streamed`] = async () => {
    await servers.script(call('weather', { city: 'Vienna' }), 'It rains.')
    const answer = streamText({
      model: make(servers.scripted), prompt: 'The weather in Vienna?', tools: { weather }, stopWhen: stepCountIs(3)
    })
    assert.equal(await answer.text, 'It rains.')
  }
  if (name !== 'compatible') {
    flows[`structured: ${name}`] = async () => {
      const { output } = await generateText({
        model: make(servers.url), prompt: 'Describe the Danube.', output: Output.object({ schema: River })
      })
      River.parse(output)
    }
  }
}
flows['structured: compatible, as JSON'] = async () => {
  await servers.script('{"name": "Danube", "length_km": 2850}') // the schema is not sent unless one says so
  const { output } = await generateText({
    model: models.compatible(servers.scripted), prompt: 'Describe the Danube.', output: Output.object({ schema: River })
  })
  assert.deepEqual(output, { name: 'Danube', length_km: 2850 })
}
flows.embeddings = async () => {
  const { embeddings } = await embedMany({
    model: compatible(servers.url).embeddingModel('any'), values: ['a river', 'a mountain']
  })
  assert.equal(embeddings.length, 2)
  assert(embeddings[0].length > 1)
}
flows['sessions: a name, across a restart'] = async () => {
  const turn = async prompt => (await generateText({
    model: compatible(servers.url, { headers: { 'X-Session-ID': 'ai-sdk' } })('any'), prompt, maxOutputTokens: 16
  })).usage.inputTokenDetails.cacheReadTokens ?? 0
  assert.equal(await turn('My name is Anna.'), 0)
  await servers.restart()
  assert(await turn('What is my name?') > 0)
}
flows.errors = async () => {
  await assert.rejects(generateText({ model: models.compatible(servers.url), prompt: 'river '.repeat(60000) }),
    error => APICallError.isInstance(error) && error.statusCode === 400 && error.message.includes('maximum context length'))
}
flows.cancel = async () => {
  const stop = new AbortController()
  let count = 0
  const answer = streamText({ model: models.compatible(servers.url), prompt: LONG, abortSignal: stop.signal, onError () {} })
  try {
    for await (const _ of answer.textStream) if (++count === 6) stop.abort()
  } catch (error) {
    if (error.name !== 'AbortError') throw error
  }
  await servers.waitIdle()
}
flows.example = async () => {
  const script = new URL('./example.mjs', import.meta.url).pathname // node looks for packages beside the script
  writeFileSync(script, example('ai_sdk.mjs', servers.url))
  assert.match(await program(process.execPath, [script], {}), /length_km/)
}
await run('ai', flows)
