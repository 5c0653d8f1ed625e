// @ts-check
/**
 * The rows of one scan as the table shows them: filtered, sorted, held still while paused. Rows are named by their place
 * in the order in which they came, which never changes.
 */

/** @import { Row } from "../scanwire.d.ts" */

/** @typedef {{ name: string, isDown: boolean }} Sort */

export const KEEP_ROWS = 100_000; // what is beyond is counted, and in the exports
const CONDITION = /^([a-z_][a-z0-9_]*)(<=|>=|<|>|=)(.*)$/i;
const SIGN = /\s*(<=|>=|<|>|=)\s*/g;

export class Rows {
  /** @type {Row[]} */
  all = [];
  received = 0;
  /** @type {number[]} the places of the rows that are shown, in the order in which they are */
  order = [];
  isPaused = false;
  /** @type {Sort | null} null: as they came */
  sort = null;
  filter = "";
  #taken = 0; // of all, into the order
  /** @type {(Row[string] | undefined)[]} */
  #keys = [];
  /** @type {(row: Row) => boolean} */
  #fits = () => true;

  /** @param {readonly Row[]} rows */
  add(rows) {
    this.received += rows.length;
    for (const row of rows) {
      if (this.all.length >= KEEP_ROWS) return;
      this.all.push(row);
    }
  }

  clear() {
    this.all = [];
    this.order = [];
    this.#keys = [];
    this.received = this.#taken = 0;
  }

  /** Rows that are there and wait for the end of the pause. */
  get waiting() {
    return this.all.length - this.#taken;
  }

  /** Takes in what has come. */
  apply() {
    if (this.isPaused || this.#taken === this.all.length) return;
    const fresh = this.#choose(this.#taken);
    this.#taken = this.all.length;
    if (this.sort === null) for (const place of fresh) this.order.push(place);
    else this.order = merge(this.order, fresh.sort(this.#compare), this.#compare);
  }

  /** @param {Sort | null} sort */
  sortBy(sort) {
    this.sort = sort;
    this.#keys = [];
    this.#arrange();
  }

  /** @param {string} text */
  filterBy(text) {
    this.filter = text;
    this.#fits = readFilter(text);
    this.#arrange();
  }

  /** The order of what was taken in, made anew. */
  #arrange() {
    this.order = this.#choose(0, this.#taken);
    if (this.sort !== null) this.order.sort(this.#compare);
  }

  /**
   * @param {number} from
   * @param {number} [to]
   */
  #choose(from, to = this.all.length) {
    const chosen = [];
    for (let place = from; place < to; place += 1) {
      const row = /** @type {Row} */ (this.all[place]);
      if (this.sort !== null) this.#keys[place] = row[this.sort.name];
      if (this.#fits(row)) chosen.push(place);
    }
    return chosen;
  }

  /** @type {(a: number, b: number) => number} */
  #compare = (a, b) => {
    const one = this.#keys[a] ?? null;
    const two = this.#keys[b] ?? null;
    if (one === two) return a - b;
    if (one === null) return 1; // nothing comes last, whichever way it is sorted
    if (two === null) return -1;
    const isMixed = typeof one !== typeof two;
    const isLess = isMixed ? typeof one < typeof two : one < two;
    return isLess === (this.sort?.isDown ?? false) ? 1 : -1;
  };
}

/**
 * @param {number[]} left
 * @param {number[]} right
 * @param {(a: number, b: number) => number} compare
 */
function merge(left, right, compare) {
  const merged = new Array(left.length + right.length);
  let from = 0;
  let taken = 0;
  for (const place of right) {
    // Few go into many: whatever lies between is copied without a look.
    let low = from;
    let high = left.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (compare(/** @type {number} */ (left[middle]), place) < 0) low = middle + 1;
      else high = middle;
    }
    while (from < low) merged[taken++] = left[from++];
    merged[taken++] = place;
  }
  while (from < left.length) merged[taken++] = left[from++];
  return merged;
}

/**
 * Words, each of which some text of the row must hold, and conditions such as `gap_pct > 0.1`.
 * @param {string} text
 * @returns {(row: Row) => boolean}
 */
function readFilter(text) {
  /** @type {((row: Row) => boolean)[]} */
  const tests = text.trim().replace(SIGN, "$1").split(/\s+/).filter((part) => part !== "").map(readPart);
  return (row) => tests.every((test) => test(row));
}

/**
 * @param {string} part
 * @returns {(row: Row) => boolean}
 */
function readPart(part) {
  const [, name = "", sign = "", wanted = ""] = CONDITION.exec(part) ?? [];
  if (wanted === "") {
    const word = part.replace(/[<>=]+$/, "").toLowerCase(); // a condition that is still being written
    return (row) => {
      for (const column in row) {
        const value = row[column];
        if (typeof value === "string" && value.toLowerCase().includes(word)) return true;
      }
      return name !== "" || /[<>=]$/.test(part);
    };
  }
  const number = Number(wanted);
  return (row) => {
    const value = row[name];
    if (value === null || value === undefined) return false;
    /** @type {[any, any]} */
    const [one, two] = typeof value === "number" ? [value, number] : [String(value).toLowerCase(), wanted.toLowerCase()];
    if (sign === "<") return one < two;
    if (sign === ">") return one > two;
    if (sign === "<=") return one <= two;
    if (sign === ">=") return one >= two;
    return one === two;
  };
}
