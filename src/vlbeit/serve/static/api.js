// The server's routes: /info, /examples and POST /v1/MODE (docs/serve.md).

/** What the server said was wrong, or that it could not be reached. */
export class ApiError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

async function read(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", "The server does not answer. Is it still running?");
  }
  const found = await response.json().catch(() => null);
  if (!response.ok || found === null) {
    const told = found?.error ?? {};
    throw new ApiError(told.code ?? "unknown", told.message ?? `The server answered ${response.status}.`);
  }
  return found;
}

export const info = () => read("/info");
export const examples = async () => (await read("/examples")).examples;

/**
 * Ask for a mode.
 * @param {string} mode
 * @param {Object} fields pictures as base64 or data URLs; undefined ones are left out
 */
export function ask(mode, fields, signal) {
  return read(`/v1/${mode}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(fields),
    signal,
  });
}

/** Only the newest of several requests matters: starting one ends the one before. */
export class Latest {
  #running = null;

  /** Runs `act(signal)`; resolves to undefined if a newer one took its place. */
  async run(act) {
    this.stop();
    const own = new AbortController();
    this.#running = own;
    try {
      const found = await act(own.signal);
      return this.#running === own ? found : undefined;
    } catch (error) {
      if (own.signal.aborted) return undefined;
      throw error;
    }
  }

  stop() {
    this.#running?.abort();
    this.#running = null;
  }
}

/** The data URL of a PNG that came as base64. */
export const pngUrl = (base64) => `data:image/png;base64,${base64}`;
