// @ts-check
/** The panel with the prices around the row that is open. */

import { showCandles } from "./candles.js";
import { find, findButton, setText } from "./dom.js";
import { get } from "./server.js";

/** @import { Row } from "../scanwire.d.ts" */
/** @typedef {{ symbol: string, is_synthetic: boolean, columns: import("./candles.js").Columns, left_out: string[] }} Prices */

const DAYS = 60;
const CALM_MS = 120; // whoever goes through the rows with a key held down asks for the last one alone
const KEPT = 50;
const HINT = "Open a row to see the 60 days around it.";

export class Chart {
  #panel = find("chart");
  #title = find("chart-title");
  #text = find("chart-text");
  #plot = find("chart-plot");
  #mark = find("chart-synthetic");
  #closer = findButton("chart-close");
  #asking = new AbortController();
  /** @type {Map<string, Prices>} */
  #kept = new Map();
  #end = () => {};

  /** @param {() => void} closed the reader has closed it */
  constructor(closed) {
    this.#closer.addEventListener("click", () => {
      this.close();
      closed();
    });
    for (const part of [this.#panel, find("grid")]) {
      part.addEventListener("keydown", (event) => {
        if (event.key !== "Escape" || this.#closer.hidden) return;
        this.close();
        closed();
      });
    }
  }

  close(hint = HINT) {
    this.#asking.abort();
    this.#clear();
    this.#panel.classList.remove("open");
    this.#closer.hidden = true;
    setText(this.#title, "Prices");
    setText(this.#text, hint);
  }

  #clear() {
    this.#end();
    this.#end = () => {};
    this.#plot.replaceChildren();
    this.#mark.hidden = true;
  }

  /** @param {Row} row */
  async open({ symbol, date }) {
    this.#asking.abort();
    this.#asking = new AbortController();
    const { signal } = this.#asking;
    if (typeof symbol !== "string" || typeof date !== "string") return this.close("This row names no symbol and day.");
    setText(this.#title, `${symbol}, ${date}`);
    this.#closer.hidden = false;
    this.#panel.classList.add("open");
    const address = `/v1/prices/${encodeURIComponent(symbol)}?around=${encodeURIComponent(date)}&days=${DAYS}`;
    try {
      const prices = this.#kept.get(address) ?? (await this.#ask(address, signal));
      if (signal.aborted) return;
      this.#clear();
      this.#mark.hidden = !prices.is_synthetic;
      setText(this.#text, prices.left_out.length > 0 ? `Left out: ${prices.left_out.join(", ")}.` : "");
      if (prices.columns.date.length === 0) setText(this.#text, "There are no prices about this day.");
      else this.#end = showCandles(this.#plot, symbol, prices.columns, date);
    } catch (error) {
      if (signal.aborted) return;
      this.#clear();
      setText(this.#text, error instanceof Error ? error.message : String(error));
    }
  }

  /**
   * @param {string} address
   * @param {AbortSignal} signal
   * @returns {Promise<Prices>}
   */
  async #ask(address, signal) {
    await new Promise((resolve) => setTimeout(resolve, CALM_MS));
    signal.throwIfAborted();
    const prices = /** @type {Prices} */ (await (await get(address, signal)).json());
    this.#kept.set(address, prices);
    for (const oldest of this.#kept.keys()) {
      if (this.#kept.size <= KEPT) break;
      this.#kept.delete(oldest);
    }
    return prices;
  }
}
