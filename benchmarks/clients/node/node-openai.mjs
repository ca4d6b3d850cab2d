// OpenAI's client for node.

import assert from 'node:assert/strict'
import OpenAI, { BadRequestError, NotFoundError } from 'openai'
import { zodResponseFormat } from 'openai/helpers/zod'
import { z } from 'zod'
import { LONG, call, run, servers } from './flows.mjs'

const at = url => new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none' })
const ask = text => [{ role: 'user', content: text }]
const model = 'gpt-4o-mini'
const River = z.object({ name: z.string(), length_km: z.number().int() })
const weather = {
  type: 'function',
  function: {
    name: 'weather',
    description: 'The weather of a city',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
    function: ({ city }) => `Rain, 4 degrees in ${city}`,
    parse: JSON.parse
  }
}

await run('openai', {
  async chat () {
    const answer = await at(servers.url).chat.completions.create({ model, messages: ask('Name a river.') })
    assert(answer.choices[0].message.content)
    assert(answer.usage.total_tokens > 0)
  },
  async stream () {
    let text = ''
    for await (const chunk of await at(servers.url).chat.completions.create({ model, messages: ask('Name a river.'), stream: true })) {
      text += chunk.choices[0]?.delta?.content ?? ''
    }
    assert(text)
  },
  async structured () {
    const answer = await at(servers.url).chat.completions.parse({
      model, messages: ask('Describe the Danube.'), response_format: zodResponseFormat(River, 'river')
    })
    River.parse(answer.choices[0].message.parsed)
  },
  async tools () {
    await servers.script(call('weather', { city: 'Vienna' }), 'It rains.')
    const runner = at(servers.scripted).chat.completions.runTools({ model, messages: ask('The weather in Vienna?'), tools: [weather] })
    assert.equal(await runner.finalContent(), 'It rains.')
    assert((await servers.asked()).includes('Rain, 4 degrees in Vienna'))
  },
  async 'tools: streamed' () {
    await servers.script(call('weather', { city: 'Vienna' }), 'It rains.')
    const runner = at(servers.scripted).chat.completions.runTools({
      model, messages: ask('The weather in Vienna?'), tools: [weather], stream: true
    })
    assert.equal(await runner.finalContent(), 'It rains.')
  },
  async embeddings () {
    // asked for as base64 unless one says otherwise
    const { data } = await at(servers.url).embeddings.create({ model, input: ['a river', 'a mountain'] })
    assert.equal(data.length, 2)
    assert(data[0].embedding.length > 1)
    assert(Math.abs(data[0].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-3)
  },
  async responses () {
    const here = at(servers.url)
    const first = await here.responses.create({ model, input: 'Name a river.' })
    assert(first.output_text)
    const second = await here.responses.create({ model, input: 'And another?', previous_response_id: first.id })
    assert(second.output_text)
    let kinds = new Set()
    for await (const event of here.responses.stream({ model, input: 'Name a river.' })) kinds.add(event.type)
    assert(kinds.has('response.output_text.delta') && kinds.has('response.completed'))
  },
  async 'sessions: a name, across a restart' () {
    const turn = async text => (await at(servers.url).chat.completions.create(
      { model, messages: ask(text), max_tokens: 16, atlas: { session_id: 'openai-node' } })).atlas_stats.history
    assert.equal(await turn('My name is Anna.'), 'new')
    await servers.restart()
    assert.notEqual(await turn('What is my name?'), 'new')
  },
  async models () {
    const here = at(servers.url)
    const listed = []
    for await (const one of here.models.list()) listed.push(one.id)
    assert.equal((await here.models.retrieve(listed[0])).id, listed[0])
  },
  async tokens () {
    assert((await at(servers.url).responses.inputTokens.count({ model, input: 'Name a river.' })).input_tokens > 0)
  },
  async errors () {
    const here = at(servers.url)
    await assert.rejects(here.chat.completions.create({ model, messages: ask('a'), top_p: 9 }),
      error => error instanceof BadRequestError && error.param === 'top_p')
    await assert.rejects(here.chat.completions.create({ model, messages: ask('river '.repeat(60000)) }),
      error => error.code === 'context_length_exceeded')
    await assert.rejects(here.models.retrieve('no-such-model'), NotFoundError)
  },
  async cancel () {
    const stream = await at(servers.url).chat.completions.create({ model, messages: ask(LONG), max_tokens: 4000, stream: true })
    let count = 0
    for await (const _ of stream) if (++count === 6) break
    await servers.waitIdle()
  }
})
