// Claude Code, told by two variables where its model is. Its instructions and tools are some 20 000 tokens.

import assert from 'node:assert/strict'
import { call, example, program, run, servers } from './flows.mjs'

const settings = example('claude-code.json', servers.scripted)
const claude = (...args) => program('claude', ['-p', ...args, '--settings', settings], {})

await run('@anthropic-ai/claude-code', {
  async chat () {
    await servers.script('It flows to the sea.')
    assert.match(await claude('Name a river.'), /It flows to the sea/)
  },
  async tools () {
    await servers.script(call('Bash', { command: 'echo river-$((40+2))', description: 'Says it' }), 'Done.')
    assert.match(await claude('Say it.', '--allowedTools', 'Bash'), /Done/)
    assert((await servers.asked()).includes('river-42'))
  }
})
