// Requests to this server: JSON, server-sent events, and errors that name the field.

const KEY = "atlas.key";

export class ApiError extends Error {
  /** Status 0: the server could not be reached, or its answer was cut off. */
  constructor(status, message, { code = "", param = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  /** Whether the server is only not there yet. */
  get passing() {
    return this.status === 0 || (this.status === 503 && /load|drain|unavailable|overloaded/.test(this.code + this.message));
  }
}

export const apiKey = {
  get() {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  },
  set(value, keep) {
    for (const store of [sessionStorage, localStorage]) store.removeItem(KEY);
    if (value) (keep ? localStorage : sessionStorage).setItem(KEY, value);
  },
  get kept() {
    return localStorage.getItem(KEY) !== null;
  },
};

function options(body, signal, accept) {
  const headers = { Accept: accept };
  const key = apiKey.get();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  return { method, headers, signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body) };
}

async function send(path, body, signal, accept) {
  let response;
  try {
    response = await fetch(path, options(body, signal, accept));
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let found = {};
  try {
    found = (await response.json()).error ?? {};
  } catch {
    // no JSON: a proxy's page
  }
  return problem(found, response.status, Number(response.headers.get("Retry-After")) || 0);
}

function problem(found, status, retryAfter) {
  let message = found.message || `The server answered with status ${status}`;
  if (found.param && !message.includes(found.param)) message = `${found.param}: ${message}`;
  return new ApiError(status, message, { code: String(found.code ?? ""), param: found.param ?? null, retryAfter });
}

/** The JSON of a GET, or of a POST where there is a body. */
export async function call(path, body, signal) {
  const response = await send(path, body, signal, "application/json");
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server’s answer was cut off");
  }
}

/** The objects of a stream of server-sent events, until it says that it is done. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal, "text/event-stream");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (read.done) break;
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw problem(found.error, found.error.type === "server_error" ? 500 : 503, 0);
      yield found;
    }
  }
  throw new ApiError(0, "The connection was lost before the end of the answer");
}
