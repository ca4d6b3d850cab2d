// Markdown as text nodes: no markup of the model's ever reaches the page, and each piece of text knows where in the source
// it stands, so that tokens can be marked in it.

import { button, copy, el } from "/web/dom.js";

/** A text, and where each of its characters stands in the source. */
class View {
  constructor(text, at) {
    this.text = text;
    this.at = at;
  }

  slice(from, to = this.text.length) {
    return new View(this.text.slice(from, to), this.at.slice(from, to));
  }

  /** Without white space around it. */
  trim() {
    const from = this.text.length - this.text.trimStart().length;
    return this.slice(from, from + this.text.trim().length);
  }

  lines() {
    const out = [];
    let from = 0;
    for (const line of this.text.split("\n")) {
      out.push(this.slice(from, from + line.length));
      from += line.length + 1;
    }
    return out;
  }

  static join(lines) {
    const at = [];
    lines.forEach((line, index) => {
      if (index) at.push(at.length ? at[at.length - 1] : (line.at[0] ?? 0));
      for (const place of line.at) at.push(place);
    });
    return new View(lines.map((line) => line.text).join("\n"), at);
  }
}

const range = (length) => Array.from({ length }, (_, index) => index);

// --- blocks -----------------------------------------------------------------------------------------------------
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function blocks(lines) {
  const out = [];
  let index = 0;
  const until = (stop) => {
    const from = index;
    while (index < lines.length && !stop(lines[index].text)) index++;
    return lines.slice(from, index);
  };
  while (index < lines.length) {
    const { text } = lines[index];
    const begin = index;
    let made;
    let found;
    if (!text.trim()) {
      index++;
      continue;
    } else if ((found = FENCE.exec(text))) {
      const mark = found[1];
      index++;
      const body = until((line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], ""));
      made = { kind: "code", language: found[2], lines: body, closed: index < lines.length };
      index++;
    } else if ((found = HEADING.exec(text))) {
      const from = text.indexOf(found[2], text.indexOf(found[1]) + found[1].length);
      made = { kind: "heading", level: found[1].length, text: lines[index++].slice(from, from + found[2].length) };
    } else if (RULE.test(text)) {
      made = { kind: "rule" };
      index++;
    } else if (QUOTE.test(text)) {
      const body = until((line) => !line.trim() || !QUOTE.test(line));
      made = { kind: "quote", blocks: blocks(body.map((line) => line.slice(QUOTE.exec(line.text)[0].length))) };
    } else if (ITEM.test(text)) {
      made = list(lines, index);
      index = made.next;
    } else if (text.includes("|") && index + 1 < lines.length && DIVIDER.test(lines[index + 1].text) && lines[index + 1].text.includes("-")) {
      const head = cells(lines[index]);
      index += 2;
      made = { kind: "table", head, rows: until((line) => !line.trim() || !line.includes("|")).map(cells) };
    } else {
      index++;
      until((line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || (ITEM.test(line) && !/^ *\d/.test(line)) || RULE.test(line));
      made = { kind: "text", text: View.join(lines.slice(begin, index)) };
    }
    const used = lines.slice(begin, index);
    made.id = `${made.kind} ${begin} ${used.reduce((sum, line) => sum + line.text.length + 1, 0)} ${made.closed ?? ""}`;
    out.push(made);
  }
  return out;
}

function list(lines, index) {
  const first = ITEM.exec(lines[index].text);
  const ordered = /\d/.test(first[2]);
  const items = [];
  while (index < lines.length) {
    const found = ITEM.exec(lines[index].text);
    if (!found || /\d/.test(found[2]) !== ordered || found[1].length > first[1].length + 1 || RULE.test(lines[index].text)) break;
    const inside = found[0].length;
    const body = [lines[index++].slice(inside)];
    while (index < lines.length) {
      const { text } = lines[index];
      const indent = text.length - text.trimStart().length;
      if (!text.trim()) {
        const next = lines[index + 1]?.text ?? "";
        if (!next.trim() || next.length - next.trimStart().length < 2) break;
      } else if (indent <= found[1].length + 1 && (ITEM.test(text) || indent === 0)) {
        if (ITEM.test(text) || !lines[index - 1].text.trim() || FENCE.test(text) || HEADING.test(text)) break;
      }
      body.push(lines[index++].slice(Math.min(indent, inside)));
    }
    items.push(blocks(body));
    while (index < lines.length && !lines[index].text.trim() && ITEM.test(lines[index + 1]?.text ?? "")) index++;
  }
  return { kind: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, items, next: index };
}

function cells(line) {
  const out = [];
  let from = 0;
  const { text } = line;
  for (let at = 0; at <= text.length; at++) {
    if (at < text.length && (text[at] !== "|" || text[at - 1] === "\\")) continue;
    out.push(line.slice(from, at).trim());
    from = at + 1;
  }
  if (text.trim().startsWith("|")) out.shift();
  if (text.trim().endsWith("|")) out.pop();
  return out;
}

// --- the page's nodes -------------------------------------------------------------------------------------------
function build(block, marks) {
  switch (block.kind) {
    case "code":
      return code(block, marks);
    case "heading": {
      const node = el(`h${Math.min(6, block.level + 2)}`);
      inline(node, block.text, marks);
      return node;
    }
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, ...block.blocks.map((one) => build(one, marks)));
    case "list": {
      const items = block.items.map((item) => {
        const node = el("li");
        for (const one of item) {
          if (one.kind === "text") inline(node, one.text, marks);
          else node.append(build(one, marks));
        }
        return node;
      });
      return el(block.ordered ? "ol" : "ul", { start: block.ordered && block.start !== 1 ? block.start : null }, ...items);
    }
    case "table": {
      const row = (tag, views) => {
        const made = views.map((view) => {
          const cell = el(tag);
          inline(cell, view, marks);
          return cell;
        });
        return el("tr", {}, ...made);
      };
      return el("table", { tabindex: 0 }, el("thead", {}, row("th", block.head)), el("tbody", {}, ...block.rows.map((one) => row("td", one))));
    }
    default: {
      const node = el("p");
      inline(node, block.text, marks);
      return node;
    }
  }
}

function code(block, marks) {
  const view = View.join(block.lines);
  const inner = el("code");
  plain(inner, view, 0, view.text.length, marks);
  const done = button("Copy", () => copy(view.text, done), { "aria-label": "Copy this code" });
  return el("figure", { class: "code" }, el("figcaption", {}, block.language || "text", done), el("pre", { tabindex: 0 }, inner));
}

/** Text from one character to another, cut where a token begins. */
function plain(parent, view, from, to, marks) {
  while (from < to) {
    const token = marks.at(view.at[from]);
    let end = from + 1;
    while (end < to && marks.at(view.at[end]) === token) end++;
    const text = document.createTextNode(view.text.slice(from, end));
    parent.append(token < 0 ? text : marks.span(token, text));
    from = end;
  }
}

const SAFE = /^(https?:\/\/|mailto:)/i;
const AUTO = /^https?:\/\/[^\s<>()]*[^\s<>().,;:!?"']/;
const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]];

function inline(parent, view, marks, depth = 0) {
  const { text } = view;
  let from = 0;
  let at = 0;
  const flush = (to) => {
    plain(parent, view, from, to, marks);
    from = to;
  };
  const take = (node, begin, end, next) => {
    flush(at);
    inline(node, view.slice(begin, end), marks, depth + 1);
    parent.append(node);
    at = from = next;
  };
  while (at < text.length) {
    const char = text[at];
    if (char === "\\" && /[\\`*_{}[\]()#+.!|~>-]/.test(text[at + 1] ?? "")) {
      flush(at);
      from = at + 1;
      at += 2;
      continue;
    }
    if (char === "`") {
      const mark = /^`+/.exec(text.slice(at))[0];
      const end = text.indexOf(mark, at + mark.length);
      if (end > 0) {
        flush(at);
        const node = el("code");
        plain(node, view, at + mark.length, end, marks);
        parent.append(node);
        at = from = end + mark.length;
        continue;
      }
      at += mark.length;
      continue;
    }
    if (char === "[" && depth < 8) {
      const found = /^\[([^\]\n]*)\]\(\s*([^\s)]+)(?:\s+"[^"]*")?\s*\)/.exec(text.slice(at));
      if (found && SAFE.test(found[2])) {
        take(link(found[2]), at + 1, at + 1 + found[1].length, at + found[0].length);
        continue;
      }
    }
    if (char === "h" && depth < 8 && !/\w/.test(text[at - 1] ?? "")) {
      const found = AUTO.exec(text.slice(at));
      if (found) {
        flush(at);
        const node = link(found[0]);
        plain(node, view, at, at + found[0].length, marks);
        parent.append(node);
        at = from = at + found[0].length;
        continue;
      }
    }
    const pair = depth < 8 && PAIRS.find(([mark]) => text.startsWith(mark, at));
    if (pair) {
      const [mark, tag] = pair;
      const begin = at + mark.length;
      let end = text.indexOf(mark, begin + 1);
      if (mark.length === 1) while (end > 0 && text[end + 1] === mark) end = text.indexOf(mark, end + 2);
      const word = mark[0] === "_" && (/\w/.test(text[at - 1] ?? "") || /\w/.test(text[end + mark.length] ?? ""));
      if (end > 0 && !word && !/\s/.test(text[begin]) && !/\s/.test(text[end - 1])) {
        take(el(tag), begin, end, end + mark.length);
        continue;
      }
      at += mark.length;
      continue;
    }
    at++;
  }
  flush(text.length);
}

const link = (address) => el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" });

// --- tokens -----------------------------------------------------------------------------------------------------
/** Tokens of a text by position: `gates` are pairs of a length and a gate. */
class Marks {
  constructor(gates) {
    this.gates = gates;
    this.token = [];
    gates.forEach(([length], index) => {
      for (let i = 0; i < length; i++) this.token.push(index);
    });
  }

  at(place) {
    return this.token[place] ?? -1;
  }

  span(token, text) {
    const gate = this.gates[token][1];
    return el("span", { class: "t", "data-g": bucket(gate), "data-gate": gate, tabindex: -1 }, text);
  }
}

/** Which of the six colours a gate has. */
export const LIMITS = [0.02, 0.1, 0.25, 0.5, 0.75];
export const bucket = (gate) => LIMITS.filter((limit) => gate >= limit).length;

const drawn = new WeakMap();

/** Draws a source into an element; blocks that have not changed since the last time keep their nodes. */
export function render(container, source, gates = []) {
  const marks = new Marks(gates);
  const parts = blocks(new View(source, range(source.length)).lines());
  const before = drawn.get(container) ?? [];
  let same = 0;
  while (same < parts.length - 1 && same < before.length - 1 && parts[same].id === before[same].id) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const part of parts.slice(same)) container.append(build(part, marks));
  drawn.set(container, parts);
}
