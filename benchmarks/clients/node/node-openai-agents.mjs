// OpenAI's agents for node, over responses and over chat completions.

import assert from 'node:assert/strict'
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run as ask, setTracingDisabled, tool } from '@openai/agents'
import OpenAI from 'openai'
import { z } from 'zod'
import { call, run, servers } from './flows.mjs'

setTracingDisabled(true)
const River = z.object({ name: z.string(), length_km: z.number().int() })
const weather = tool({
  name: 'weather',
  description: 'The weather of a city',
  parameters: z.object({ city: z.string() }),
  execute: async ({ city }) => `Rain, 4 degrees in ${city}`
})
const flows = {}
for (const [name, Model] of Object.entries({ responses: OpenAIResponsesModel, chat: OpenAIChatCompletionsModel })) {
  const at = (url, options) => new Agent({
    name: 'Guide', model: new Model(new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none' }), 'any'), ...options
  })
  flows[`${name}: the first answer`] = async () => {
    assert((await ask(at(servers.url, { instructions: 'You are brief.' }), 'Name a river.')).finalOutput)
  }
  flows[`stream: ${name}`] = async () => {
    const found = await ask(at(servers.url), 'Name a river.', { stream: true })
    let text = ''
    for await (const piece of found.toTextStream()) text += piece
    await found.completed
    assert(text)
  }
  flows[`structured: ${name}`] = async () => {
    River.parse((await ask(at(servers.url, { outputType: River }), 'Describe the Danube.')).finalOutput)
  }
  flows[`tools: ${name}`] = async () => {
    await servers.script(call('weather', { city: 'Vienna' }), 'It rains.')
    assert.equal((await ask(at(servers.scripted, { tools: [weather] }), 'The weather in Vienna?')).finalOutput, 'It rains.')
    assert((await servers.asked()).includes('Rain, 4 degrees in Vienna'))
  }
}
await run('@openai/agents', flows)
