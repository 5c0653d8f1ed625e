// @ts-check
/**
 * The table of matches: of 100,000 rows, only those in sight are elements. It keeps its place while rows stream in: the
 * row under the reader's eye stays there, wherever the new ones go.
 */

import { make, setText } from "./dom.js";
import { chooseDecimals, formatFixed, formatPlain, LARGE } from "./format.js";

/** @import { Row } from "../scanwire.d.ts" */
/** @import { Rows } from "./rows.js" */

/** @typedef {{ name: string, label: string, text: string, isNumber: boolean, isBlank: boolean, decimals: number, chars: number }} Column */
/** @typedef {{ element: HTMLElement, cells: HTMLElement[], position: number, place: number }} Line */

const LINE_PX = 28;
const SPARE_LINES = 6; // above and below what is in sight
const MAX_CHARS = 32;
const MIN_CHARS = 9;
const SAMPLE_ROWS = 200;

export class Table {
  #grid;
  #rows;
  #open;
  #sorted;
  #head = make("div", { role: "row", class: "grid-row", "aria-rowindex": 1 });
  #body = make("div", { role: "rowgroup", class: "grid-body" });
  #empty = make("p", { class: "grid-empty soft" });
  /** @type {Column[]} */
  #columns = [];
  /** @type {Record<string, string>} */
  #texts = {};
  /** @type {string[]} */
  #hidden = [];
  /** @type {Line[]} */
  #lines = [];
  /** The row that the keyboard is at. @type {number | null} its place */
  #active = null;
  #isDue = false;

  /**
   * @param {HTMLElement} grid
   * @param {Rows} rows
   * @param {(place: number) => void} open a row was chosen
   * @param {() => void} sorted the reader has sorted
   */
  constructor(grid, rows, open, sorted) {
    this.#grid = grid;
    this.#rows = rows;
    this.#open = open;
    this.#sorted = sorted;
    grid.append(make("div", { role: "rowgroup", class: "grid-head" }, this.#head), this.#body);
    grid.after(this.#empty);
    grid.addEventListener("scroll", () => this.#drawSoon(), { passive: true });
    grid.addEventListener("keydown", (event) => this.#press(event));
    this.#body.addEventListener("click", ({ target }) => {
      const line = target instanceof Element ? target.closest("[data-place]") : null;
      if (line instanceof HTMLElement) this.#choose(Number(line.dataset.place));
    });
    new ResizeObserver(() => this.#drawSoon()).observe(grid);
  }

  /**
   * Ready for the rows of another scan.
   * @param {Record<string, string>} texts what columns mean
   * @param {string[]} hidden columns that say the same in each row
   */
  clear(texts, hidden) {
    this.#texts = texts;
    this.#hidden = hidden;
    this.#columns = [];
    this.#active = null;
    this.#head.replaceChildren();
    this.#dropLines();
    this.#grid.scrollTo(0, 0);
    this.draw();
  }

  /** What stands in place of rows. @param {string} text */
  say(text) {
    setText(this.#empty, text);
    this.#empty.hidden = text === "";
  }

  /**
   * Shows the rows as they are now, after `change`, which may put new ones anywhere.
   * @param {() => void} change
   */
  update(change) {
    const anchor = this.#findAnchor();
    change();
    this.#findColumns();
    this.#body.style.height = `${this.#rows.order.length * LINE_PX}px`;
    if (anchor !== null) {
      const position = this.#rows.order.indexOf(anchor.place);
      if (position >= 0 && position !== anchor.position) {
        this.#grid.scrollTop += (position - anchor.position) * LINE_PX;
      }
    }
    this.draw();
  }

  /** The row at the top of what is in sight; none at the very top, where new rows are let in. */
  #findAnchor() {
    const { scrollTop, clientHeight } = this.#grid;
    const { order } = this.#rows;
    if (this.#rows.sort === null) return null; // what comes goes below
    const first = Math.ceil(scrollTop / LINE_PX);
    const last = Math.floor((scrollTop + clientHeight) / LINE_PX) - 2;
    const held = this.#active === null ? -1 : order.indexOf(this.#active);
    const position = held >= first && held <= last ? held : scrollTop < LINE_PX / 2 ? -1 : first;
    const place = order[position];
    return place === undefined ? null : { place, position };
  }

  // Columns.

  #findColumns() {
    const { all } = this.#rows;
    const known = new Map(this.#columns.map((column) => [column.name, column]));
    // Rows of one scanner are all alike; those of a producer need not be.
    const sample = this.#columns.length === 0 ? all.slice(0, SAMPLE_ROWS) : all.slice(-SAMPLE_ROWS);
    /** @type {Set<string>} */
    const names = new Set();
    for (const row of sample) {
      for (const name in row) {
        // What a column is shows with its first value.
        const isKnown = known.has(name) && !(known.get(name)?.isBlank && row[name] !== null);
        if (!isKnown && !this.#hidden.includes(name)) names.add(name);
      }
    }
    if (names.size === 0) return;
    for (const name of names) {
      const at = [...known.keys()].indexOf(name);
      const index = at >= 0 ? at : this.#columns.length;
      this.#columns[index] = this.#makeColumn(name, sample, index);
    }
    this.#head.replaceChildren(...this.#columns.map((column, index) => this.#makeHeader(column, index)));
    this.#grid.style.setProperty("--columns", this.#columns.map((column) => `${column.chars}ch`).join(" "));
    this.#grid.setAttribute("aria-colcount", `${this.#columns.length}`);
    this.#showSort();
    this.#dropLines();
  }

  /**
   * @param {string} name
   * @param {Row[]} sample
   * @param {number} index
   * @returns {Column}
   */
  #makeColumn(name, sample, index) {
    const label = name.replaceAll("_", " ");
    const isNumber = sample.some((row) => typeof row[name] === "number");
    const isBlank = sample.every((row) => (row[name] ?? null) === null);
    const decimals = isNumber ? chooseDecimals(sample, name) : 0;
    const column = { name, label, text: this.#texts[name] ?? name, isNumber, isBlank, decimals, chars: 0 };
    const longest = Math.max(...sample.map((row) => writeCell(row, column).length), label.length + 1);
    const bold = index === 0 ? 2 : 0; // the first one is written larger
    return { ...column, chars: bold + Math.min(Math.max(longest + 3, MIN_CHARS), MAX_CHARS) };
  }

  /**
   * @param {Column} column
   * @param {number} index
   */
  #makeHeader(column, index) {
    const button = make("button", { type: "button", title: column.text }, column.label);
    button.addEventListener("click", () => this.#sortBy(column));
    const kind = column.isNumber ? "num" : null;
    return make("div", { role: "columnheader", class: kind, "aria-colindex": index + 1 }, button);
  }

  /** @param {Column} column first one way, then the other, then as they came */
  #sortBy({ name, isNumber }) {
    const before = this.#rows.sort;
    const first = isNumber; // the largest are what people look for
    const next = before?.name !== name ? { name, isDown: first } : before.isDown === first ? { name, isDown: !first } : null;
    this.#rows.sortBy(next);
    this.#showSort();
    this.#grid.scrollTop = 0;
    this.draw();
    this.#sorted();
  }

  #showSort() {
    const { sort } = this.#rows;
    this.#columns.forEach(({ name }, index) => {
      const state = sort?.name !== name ? "none" : sort.isDown ? "descending" : "ascending";
      this.#head.children[index]?.setAttribute("aria-sort", state);
    });
  }

  // Rows.

  #drawSoon() {
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => {
      this.#isDue = false;
      this.draw();
    });
  }

  draw() {
    const { order } = this.#rows;
    const inSight = Math.ceil(this.#grid.clientHeight / LINE_PX) + 1;
    const first = Math.max(Math.floor(this.#grid.scrollTop / LINE_PX) - SPARE_LINES, 0);
    const last = Math.min(first + inSight + 2 * SPARE_LINES, order.length);
    this.#grid.setAttribute("aria-rowcount", `${order.length + 1}`);
    // A line is used again for the position that is as many positions on as there are lines.
    const count = inSight + 2 * SPARE_LINES;
    if (this.#lines.length < count && last > first) this.#addLines(count);
    for (let position = first; position < first + this.#lines.length; position += 1) {
      const line = /** @type {Line} */ (this.#lines[position % this.#lines.length]);
      const place = position < last ? order[position] : undefined;
      if (place === undefined) this.#hide(line);
      else this.#fill(line, position, place);
    }
    this.#showActive();
  }

  /** @param {number} count */
  #addLines(count) {
    this.#dropLines();
    for (let index = 0; index < count; index += 1) {
      const cells = this.#columns.map((column, at) =>
        make("div", { role: "gridcell", class: column.isNumber ? "num" : null, "aria-colindex": at + 1 }),
      );
      const element = make("div", { role: "row", class: "grid-row", id: `row-${index}` }, ...cells);
      element.hidden = true;
      this.#lines.push({ element, cells, position: -1, place: -1 });
      this.#body.append(element);
    }
  }

  #dropLines() {
    this.#lines = [];
    this.#body.replaceChildren();
    this.#grid.removeAttribute("aria-activedescendant");
  }

  /** @param {Line} line */
  #hide(line) {
    if (line.place < 0) return;
    line.element.hidden = true;
    line.position = line.place = -1;
  }

  /**
   * @param {Line} line
   * @param {number} position
   * @param {number} place
   */
  #fill(line, position, place) {
    const { element, cells } = line;
    if (line.position !== position) {
      line.position = position;
      element.style.transform = `translateY(${position * LINE_PX}px)`;
      element.setAttribute("aria-rowindex", `${position + 2}`);
      element.classList.toggle("odd", position % 2 === 1);
    }
    if (line.place === place) return;
    line.place = place;
    element.dataset.place = `${place}`;
    const row = /** @type {Row} */ (this.#rows.all[place]);
    this.#columns.forEach((column, index) => setText(/** @type {Node} */ (cells[index]), writeCell(row, column)));
    element.hidden = false;
  }

  // The keyboard.

  /** Scrolls to where the keyboard is. */
  reveal() {
    this.#body.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #showActive() {
    let found = null;
    for (const { element, place } of this.#lines) {
      const isActive = place >= 0 && place === this.#active;
      if (isActive) found = element;
      if (isActive) element.setAttribute("aria-selected", "true");
      else element.removeAttribute("aria-selected");
    }
    if (found === null) this.#grid.removeAttribute("aria-activedescendant");
    else this.#grid.setAttribute("aria-activedescendant", found.id);
  }

  /** @param {number} place */
  #choose(place) {
    this.#active = place;
    this.#showActive();
    this.#open(place);
  }

  /** @param {KeyboardEvent} event */
  #press(event) {
    if (event.target !== this.#grid || event.ctrlKey || event.metaKey || event.altKey) return;
    const { order } = this.#rows;
    const at = this.#active === null ? -1 : order.indexOf(this.#active);
    const page = Math.max(Math.floor(this.#grid.clientHeight / LINE_PX) - 2, 1);
    /** @type {Record<string, number>} */
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: order.length };
    const move = moves[event.key];
    if (order.length > 0 && move !== undefined) {
      const position = Math.min(Math.max(move, 0), order.length - 1);
      this.#active = order[position] ?? null;
      this.#scrollTo(position);
      this.draw();
    } else if ((event.key === "Enter" || event.key === " ") && this.#active !== null) {
      this.#open(this.#active);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** @param {number} position */
  #scrollTo(position) {
    const top = position * LINE_PX;
    const height = this.#grid.clientHeight - 2 * LINE_PX; // the head covers one
    if (top < this.#grid.scrollTop) this.#grid.scrollTop = top;
    else if (top > this.#grid.scrollTop + height) this.#grid.scrollTop = top - height;
  }
}

/**
 * @param {Row} row
 * @param {Pick<Column, "name" | "decimals">} column
 */
function writeCell(row, { name, decimals }) {
  const value = row[name];
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") {
    const isCut = decimals === 0 && !Number.isInteger(value) && Math.abs(value) < LARGE; // among whole numbers
    return isCut ? formatPlain(value) : formatFixed(value, decimals);
  }
  if (typeof value === "boolean") return value ? "yes" : "no";
  return value;
}
