// Anthropic's client for node.

import assert from 'node:assert/strict'
import Anthropic, { BadRequestError } from '@anthropic-ai/sdk'
import { LONG, call, run, servers } from './flows.mjs'

const at = url => new Anthropic({ baseURL: url, apiKey: 'none' })
const ask = text => [{ role: 'user', content: text }]
const model = 'claude-haiku-4-5'
const textOf = message => message.content.map(block => block.text ?? '').join('')
const weather = {
  name: 'weather',
  description: 'The weather of a city',
  input_schema: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] }
}

await run('@anthropic-ai/sdk', {
  async chat () {
    const answer = await at(servers.url).messages.create({ model, max_tokens: 64, messages: ask('Name a river.') })
    assert(textOf(answer))
  },
  async stream () {
    const answer = await at(servers.url).messages.stream({ model, max_tokens: 64, messages: ask('Name a river.') }).finalMessage()
    assert(textOf(answer))
  },
  async tools () {
    await servers.script(call('weather', { city: 'Vienna' }), 'It rains.')
    const here = at(servers.scripted)
    const messages = ask('The weather in Vienna?')
    const first = await here.messages.stream({ model, max_tokens: 300, messages, tools: [weather] }).finalMessage()
    const made = first.content.find(block => block.type === 'tool_use')
    assert.deepEqual(made.input, { city: 'Vienna' })
    const result = { type: 'tool_result', tool_use_id: made.id, content: 'Rain, 4 degrees' }
    messages.push({ role: 'assistant', content: first.content }, { role: 'user', content: [result] })
    const second = await here.messages.create({ model, max_tokens: 64, messages, tools: [weather] })
    assert.equal(textOf(second), 'It rains.')
    assert((await servers.asked()).includes('Rain, 4 degrees'))
  },
  async models () {
    const listed = []
    for await (const one of at(servers.url).models.list()) listed.push(one)
    assert.equal(listed[0].type, 'model')
  },
  async tokens () {
    assert((await at(servers.url).messages.countTokens({ model, messages: ask('Name a river.') })).input_tokens > 0)
  },
  async errors () {
    await assert.rejects(
      at(servers.url).messages.create({ model, max_tokens: 16, messages: ask('river '.repeat(60000)) }),
      error => error instanceof BadRequestError && error.message.includes('prompt is too long'))
  },
  async cancel () {
    const stream = await at(servers.url).messages.create({ model, max_tokens: 4000, messages: ask(LONG), stream: true })
    let count = 0
    for await (const _ of stream) if (++count === 6) break
    await servers.waitIdle()
  }
})
