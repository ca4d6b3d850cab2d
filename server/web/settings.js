// The settings sheet. Fields, bounds and explanations are those of the server's OpenAPI document, defaults are what it says
// it uses, so that this page knows no setting by itself.

import { call } from "/web/api.js";
import { $, el } from "/web/dom.js";
import { store } from "/web/store.js";

const CHAT = ["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_completion_tokens", "seed"];
const NOT_SETTINGS = ["session_id", "regenerate", "token_gates"];
const FIRST = ["enabled", "window_size", "blend_ratio", "memory_budget", "kept_pairs", "memory_layers"];

let document_ = null;

/** What requests carry of the settings: `atlas` fields, sampling fields, the system message. */
export function chosen() {
  const { atlas = {}, chat = {}, system = "" } = store.settings;
  return { atlas, chat, system };
}

/** Draws the sheet; says which fields there are. */
export async function draw() {
  document_ ??= await call("/schema/openapi.json");
  const schemas = document_.components.schemas;
  const [config, props] = await Promise.all([quiet("/v1/atlas/config"), quiet("/props")]);
  const { atlas, chat, system } = chosen();
  const properties = schemas.AtlasOptions.properties;
  const names = Object.keys(properties).filter((name) => !NOT_SETTINGS.includes(name));
  names.sort((a, b) => place(a) - place(b));
  const text = el("textarea", { id: "set-system", rows: 2 });
  text.value = system;
  $("settings-chat").replaceChildren(
    el("p", { class: "wide" }, el("label", { for: "set-system" }, "System message"), text),
    ...CHAT.map((name) => field(name, "chat", schemas.ChatRequest.properties[name] ?? {}, props?.default_generation_settings?.params, chat)),
  );
  $("settings-atlas").replaceChildren(...names.map((name) => field(name, "atlas", properties[name], config?.data, atlas)));
  if (!config) $("settings-atlas").prepend(el("p", { class: "note wide" }, "This server has no memory, or does not say how it is set."));
}

const place = (name) => (FIRST.indexOf(name) + 1 || FIRST.length + 1);
const quiet = (path) => call(path).catch(() => null);

/** One field: a label, a control, an explanation with the bounds. */
function field(name, group, schema, defaults, values) {
  const shape = schema.anyOf?.find((one) => one.type !== "null") ?? schema;
  const id = `set-${group}-${name}`;
  const byDefault = defaults && name in defaults ? defaults[name] : undefined;
  const said = byDefault === undefined ? "server’s" : byDefault === null ? "automatic" : byDefault === true ? "on" : byDefault === false ? "off" : String(byDefault);
  const choices = shape.type === "boolean" ? [["on", true], ["off", false]] : shape.enum?.map((one) => [one, one]);
  const attributes = { id, "data-group": group, "data-name": name, "aria-describedby": `${id}-help` };
  let control;
  if (choices) {
    control = el("select", attributes, el("option", { value: "" }, `${said} (server)`), ...choices.map(([text, value]) => el("option", { value: JSON.stringify(value) }, text)));
    control.value = values[name] === undefined ? "" : JSON.stringify(values[name]);
  } else {
    const whole = shape.type === "integer";
    control = el("input", { ...attributes, type: "text", inputmode: whole ? "numeric" : "decimal", placeholder: said, autocomplete: "off" });
    control.value = values[name] ?? "";
  }
  const least = shape.minimum ?? shape.exclusiveMinimum;
  const most = shape.maximum ?? shape.exclusiveMaximum;
  const bounds = least === undefined || least < -(2 ** 31) ? "" : most !== undefined && most < 2 ** 31 - 1 ? `${least} to ${most}. ` : `At least ${least}. `;
  const help = bounds + (schema.description ?? shape.description ?? "");
  return el("p", {}, el("label", { for: id }, el("code", {}, name)), control, el("span", { class: "note", id: `${id}-help` }, help));
}

/** Reads the sheet and keeps it; throws what is no number, by name. */
export function take() {
  const settings = { atlas: {}, chat: {}, system: $("set-system").value.trim() };
  for (const control of $("settings-form").querySelectorAll("[data-name]")) {
    const { group, name } = control.dataset;
    const value = control.value.trim();
    control.removeAttribute("aria-invalid");
    if (!value) continue;
    const read = control.tagName === "SELECT" ? JSON.parse(value) : Number(value);
    if (typeof read === "number" && !Number.isFinite(read)) {
      control.setAttribute("aria-invalid", "true");
      control.focus();
      throw new Error(`${group === "atlas" ? "atlas." : ""}${name}: must be a number`);
    }
    settings[group][name] = read;
  }
  store.settings = settings;
}

/** Leads from an error to the setting it names. */
export function settingOf(error) {
  const [group, name] = error.param?.startsWith("atlas.") ? ["atlas", error.param.slice(6)] : ["chat", error.param ?? ""];
  return CHAT.includes(name) || (group === "atlas" && !NOT_SETTINGS.includes(name)) ? `set-${group}-${name}` : null;
}
