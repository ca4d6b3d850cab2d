// Codex, told by its configuration where its model is.

import assert from 'node:assert/strict'
import { call, program, run, servers } from './flows.mjs'

const provider = `{name="atlas-jax", base_url="${servers.scripted}/v1", env_key="ATLAS_KEY", wire_api="responses"}`
const codex = prompt => program('codex', [
  'exec', '--skip-git-repo-check', '-c', 'model="any"', '-c', 'model_provider="atlas"',
  '-c', `model_providers.atlas=${provider}`, prompt
], { ATLAS_KEY: 'none' })

await run('@openai/codex', {
  async chat () {
    await servers.script('It flows to the sea.')
    assert.match(await codex('Name a river.'), /It flows to the sea/)
  },
  async tools () {
    await servers.script(call('exec_command', { cmd: 'echo river-$((40+2))' }), 'Done.')
    assert.match(await codex('Say it.'), /Done/)
    assert((await servers.asked()).includes('river-42'))
  }
})
