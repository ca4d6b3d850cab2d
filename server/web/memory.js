// The memory of the current session: how full its parts are, and what the last answer took of it.

import { $, el, number, percent } from "/web/dom.js";
import { LIMITS } from "/web/markdown.js";

const PARTS = [
  ["window", "Window", "window_fill", "window_size", "tokens attended exactly"],
  ["kept", "Kept pairs", "kept_pairs", "kept_pairs_capacity", "of what has left the window, per head"],
  ["omega", "Omega memory", "memory_used", "memory_capacity", "directions written"],
];

/** Draws the three parts; `info` is of `GET /v1/atlas/memory`, `grown` tokens that the answer has come to since. */
export function drawParts(info, grown = 0) {
  const meters = $("meters");
  if (!meters.childElementCount) {
    meters.append(
      ...PARTS.map(([id, name, , , what]) =>
        el(
          "div",
          {},
          el("dt", { id: `${id}-name` }, name, el("span", { id: `${id}-said` })),
          el("dd", {}, el("progress", { id: `${id}-bar`, "aria-labelledby": `${id}-name`, max: 1, value: 0 }), el("span", { class: "note" }, what)),
        ),
      ),
    );
  }
  for (const [id, , used, capacity] of PARTS) {
    const most = info?.[capacity] ?? 0;
    const now = Math.min(most, (info?.[used] ?? 0) + (id === "window" ? grown : 0));
    $(`${id}-bar`).value = most ? now / most : 0;
    $(`${id}-said`).textContent = most ? `${number(now)} of ${number(most)}` : "empty";
  }
  const layers = info?.layers ?? [];
  const row = (tag, ...texts) => el("tr", {}, ...texts.map((text) => el(tag, {}, text)));
  $("layers").replaceChildren(
    layers.length
      ? el(
          "table",
          {},
          el("thead", {}, row("th", "layer", "norm", "rank", "loss")),
          el("tbody", {}, ...layers.map((one) => row("td", String(one.layer), number(one.norm, 2), number(one.effective_rank, 1), number(one.omega_loss, 3)))),
        )
      : el("p", { class: "note" }, "Nothing has been written yet."),
  );
}

/** Draws the figures of the answer that is being written, or was written last; names with nothing to say are left out. */
export function drawFigures(figures) {
  const rows = [
    ["Speed", figures.rate && `${number(figures.rate, 1)} tokens/s`],
    ["Prompt", figures.promptRate && `${number(figures.promptRate)} tokens/s`],
    ["Tokens of the answer", figures.tokens && number(figures.tokens)],
    ["Context used", figures.context && (figures.contextSize ? `${number(figures.context)} of ${number(figures.contextSize)}` : number(figures.context))],
    ["Not read again", figures.reused && `${number(figures.reused)} tokens`],
    ["From the memory", figures.gate !== undefined && percent(figures.gate)],
    ["History", figures.history?.replace("_", " ")],
    ["Session", figures.session && `${number(figures.session)} tokens`],
    ["Note", figures.degraded],
  ];
  $("figures").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

export function drawLegend() {
  const limits = [0, ...LIMITS].map((limit) => `${Math.round(100 * limit)}+`);
  limits[0] = `< ${Math.round(100 * LIMITS[0])}`;
  $("legend").replaceChildren(...limits.map((text, index) => el("li", { "data-g": index }, text, el("span", { class: "hidden" }, " percent"))));
}
