// Codex, told by its configuration where its model is.

import assert from 'node:assert/strict'
import { mkdirSync, writeFileSync } from 'node:fs'
import { call, example, program, run, servers } from './flows.mjs'

const home = `${process.env.HOME}/codex-home`
mkdirSync(home, { recursive: true })
writeFileSync(`${home}/config.toml`, example('codex.toml', servers.scripted))
const codex = prompt => program('codex', ['exec', '--skip-git-repo-check', prompt], { ATLAS_KEY: 'none', CODEX_HOME: home })

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
