// What this browser keeps: conversations by the name of their session, the current one, settings, the theme.

const CHAT = "atlas.chat.";
const read = (store, name) => {
  try {
    return JSON.parse(store.getItem(name));
  } catch {
    return null;
  }
};

export const store = {
  /** Whether conversations outlive the tab. */
  get keeps() {
    return localStorage.getItem("atlas.keep") !== "no";
  },
  set keeps(value) {
    const names = this.names();
    const from = this.chats;
    localStorage.setItem("atlas.keep", value ? "yes" : "no");
    const to = this.chats;
    if (from === to) return;
    for (const name of [...names.map((one) => CHAT + one), "atlas.current"]) {
      const text = from.getItem(name);
      from.removeItem(name);
      if (text !== null) to.setItem(name, text);
    }
  },

  get chats() {
    return this.keeps ? localStorage : sessionStorage;
  },

  names() {
    return Object.keys(this.chats)
      .filter((name) => name.startsWith(CHAT))
      .map((name) => name.slice(CHAT.length));
  },

  read(name) {
    const found = read(this.chats, CHAT + name);
    return found && Array.isArray(found.messages) ? found : null;
  },

  /** False where the browser has no more room. */
  write(name, chat) {
    try {
      this.chats.setItem(CHAT + name, JSON.stringify(chat));
      return true;
    } catch {
      return false;
    }
  },

  remove(name) {
    this.chats.removeItem(CHAT + name);
  },

  get current() {
    return this.chats.getItem("atlas.current");
  },
  set current(name) {
    if (name) this.chats.setItem("atlas.current", name);
    else this.chats.removeItem("atlas.current");
  },

  get settings() {
    return read(localStorage, "atlas.settings") ?? {};
  },
  set settings(value) {
    localStorage.setItem("atlas.settings", JSON.stringify(value));
  },

  forget() {
    for (const where of [localStorage, sessionStorage]) {
      for (const name of Object.keys(where)) if (name.startsWith("atlas.")) where.removeItem(name);
    }
  },
};
