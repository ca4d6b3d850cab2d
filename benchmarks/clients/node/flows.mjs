// What the scripts of node's clients share; flows.py in JavaScript.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { readFileSync } from 'node:fs'

export const servers = {
  url: process.env.CLIENTS_URL,
  scripted: process.env.CLIENTS_SCRIPTED,
  script: (...answers) => control('/script', answers),
  asked: async () => JSON.stringify(await control('/asked', {})),
  restart: () => control('/restart', {}),
  async waitIdle () {
    const end = Date.now() + 60_000
    for (;;) {
      const slots = await (await fetch(`${servers.url}/slots`)).json()
      if (!slots.some(slot => slot.is_processing)) return
      assert(Date.now() < end, 'the server went on after the client had left')
      await new Promise(resolve => setTimeout(resolve, 50))
    }
  }
}
export const LONG = 'Write a very long story of a river, with everything that lives in it.'
export const call = (name, args) => `<tool_call>\n${JSON.stringify({ name, arguments: args })}\n</tool_call>`

async function control (path, body) {
  const answer = await fetch(process.env.CLIENTS_CONTROL + path, { method: 'POST', body: JSON.stringify(body) })
  return answer.json()
}

// An example of the repository, with a server at another address.
export function example (name, url) {
  return readFileSync(`${process.env.PYTHONPATH}/examples/clients/${name}`, 'utf8').replaceAll('http://127.0.0.1:8080', url)
}

// What a program prints that a package has installed; it reads nothing.
export function program (name, args, environ) {
  return new Promise((resolve, reject) => {
    const path = name.startsWith('/') ? name : new URL(`./node_modules/.bin/${name}`, import.meta.url).pathname
    const child = execFile(path, args, { env: { ...process.env, ...environ } }, (error, out, err) => {
      if (error) reject(new Error(`${name} ended with ${error.code}: ${(out + err).trim().split('\n').pop()}`))
      else resolve(out)
    })
    child.stdin.end()
  })
}

export async function run (name, flows) {
  const found = JSON.parse(readFileSync(new URL(`./node_modules/${name}/package.json`, import.meta.url)))
  const wanted = process.argv.slice(2)
  for (const [flow, check] of Object.entries(flows)) {
    if (wanted.length && !wanted.some(one => flow.startsWith(one))) continue
    await servers.script()
    const started = Date.now()
    let why = null
    try {
      await check()
    } catch (error) {
      console.error(error)
      why = `${error.name}: ${error.message}`.split('\n')[0].slice(0, 300)
    }
    const seconds = (Date.now() - started) / 1000
    console.log(JSON.stringify({ version: found.version, flow, ok: why === null, why, seconds }))
  }
  process.exit(0)
}
