// Small helpers of the page. Text becomes text nodes, never markup.

export const $ = (id) => document.getElementById(id);

/** An element: attributes, then children, strings among them. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const button = (text, onclick, attributes = {}) => el("button", { type: "button", onclick, ...attributes }, text);

/** Tells people who do not see the page what has happened on it. */
export function say(text) {
  $("said").textContent = "";
  requestAnimationFrame(() => ($("said").textContent = text));
}

export function show(problem, error) {
  problem.hidden = !error;
  problem.textContent = error ? (error.message ?? String(error)) : "";
}

export const number = (value, digits = 0) =>
  Number(value ?? 0).toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

export const percent = (value) => `${number(100 * value, value > 0 && value < 0.1 ? 1 : 0)} %`;

/** Opens a dialog and runs `work` when its form is sent; it stays open, with the error, where that fails. */
export function open(id, work, focus) {
  const dialog = $(id);
  const form = dialog.querySelector("form");
  const problem = dialog.querySelector(".problem");
  if (problem) show(problem, null);
  if (form) {
    form.onsubmit = async (event) => {
      event.preventDefault();
      const done = form.querySelector("[type=submit]");
      done.disabled = true;
      try {
        await work();
        dialog.close();
      } catch (error) {
        show(problem, error);
      } finally {
        done.disabled = false;
      }
    };
  }
  for (const close of dialog.querySelectorAll("[data-close]")) close.onclick = () => dialog.close();
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close(); // beside the sheet
  };
  dialog.showModal();
  focus?.focus();
}

export async function copy(text, done) {
  const before = done.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "hidden" });
    area.value = text;
    done.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    done.focus();
  }
  done.textContent = "Copied";
  say("Copied");
  setTimeout(() => (done.textContent = before), 1500);
}
