// Ollama's client for node.

import assert from 'node:assert/strict'
import { Ollama } from 'ollama'
import { call, run, servers } from './flows.mjs'

const at = url => new Ollama({ host: url })
const model = 'llama3.2'
const ask = text => [{ role: 'user', content: text }]
const weather = {
  type: 'function',
  function: {
    name: 'weather',
    description: 'The weather of a city',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] }
  }
}

await run('ollama', {
  async chat () {
    assert((await at(servers.url).chat({ model, messages: ask('Name a river.') })).message.content)
  },
  async stream () {
    let text = ''
    for await (const part of await at(servers.url).chat({ model, messages: ask('Name a river.'), stream: true })) {
      text += part.message.content
    }
    assert(text)
  },
  async tools () {
    await servers.script(call('weather', { city: 'Vienna' }), 'It rains.')
    const messages = ask('The weather in Vienna?')
    const first = await at(servers.scripted).chat({ model, messages, tools: [weather] })
    assert.deepEqual(first.message.tool_calls[0].function.arguments, { city: 'Vienna' })
    messages.push(first.message, { role: 'tool', tool_name: 'weather', content: 'Rain, 4 degrees' })
    assert.equal((await at(servers.scripted).chat({ model, messages, tools: [weather] })).message.content, 'It rains.')
  },
  async embeddings () {
    assert.equal((await at(servers.url).embed({ model, input: ['a river', 'a mountain'] })).embeddings.length, 2)
  },
  async models () {
    assert((await at(servers.url).list()).models.length > 0)
  },
  async errors () {
    await assert.rejects(at(servers.url).chat({ model, messages: ask('river '.repeat(60000)) }),
      error => error.status_code === 400)
  }
})
