// @ts-check
/** Numbers, times and names, written for people in their own locale. */

/** @import { Row, Snapshot } from "../scanwire.d.ts" */

const whole = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const plain = new Intl.NumberFormat(undefined, { maximumFractionDigits: 6 });
const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 });
const ordinals = new Intl.PluralRules("en", { type: "ordinal" });
/** @type {Record<string, string>} */
const SUFFIXES = { one: "st", two: "nd", few: "rd", other: "th" };
export const LARGE = 100_000; // decimals say nothing any more
/** @type {Map<number, Intl.NumberFormat>} */
const fixed = new Map();

export const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
export const moment = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

/** @param {number} value */
export const formatWhole = (value) => whole.format(value);
/** @param {number} value with the decimals that it has */
export const formatPlain = (value) => plain.format(value);
/** @param {number} value */
export const formatShort = (value) => short.format(value);

/**
 * @param {number} value
 * @param {number} decimals
 */
export function formatFixed(value, decimals) {
  let format = fixed.get(decimals);
  if (format === undefined) {
    format = new Intl.NumberFormat(undefined, { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
    fixed.set(decimals, format);
  }
  return format.format(value);
}

/** @param {number} price */
export const formatPrice = (price) => formatFixed(price, Math.abs(price) < 1 ? 4 : 2);

/**
 * A rate per second, with as many digits as say something.
 * @param {number} rate
 */
export const formatRate = (rate) => formatFixed(rate, rate < 10 ? 1 : 0);

/** @param {number} seconds */
export function formatDuration(seconds) {
  if (seconds < 10) return `${formatFixed(Math.max(seconds, 0), 1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  const rest = String(Math.floor(seconds % 60)).padStart(2, "0");
  if (minutes < 60) return `${minutes}:${rest} min`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest} h`;
}

/**
 * "about 20 to 40 s", and never more exact than a guess can be.
 * @param {[number, number]} range in seconds
 */
export function formatRange([low, high]) {
  if (high < 1.5) return "about 1 s";
  const unit = high < 100 ? 1 : 60;
  const from = roundAbout(low / unit);
  const to = Math.max(roundAbout(high / unit), 1);
  const name = unit === 1 ? "s" : "min";
  if (from === 0) return `up to ${to} ${name}`;
  return from >= to ? `about ${to} ${name}` : `about ${from} to ${to} ${name}`;
}

/** @param {number} value */
function roundAbout(value) {
  const step = value < 20 ? 1 : value < 60 ? 5 : 10;
  return Math.round(value / step) * step;
}

/** @param {number} count */
export const formatOrdinal = (count) => `${count}${SUFFIXES[ordinals.select(count)] ?? "th"}`;

/**
 * @param {number} count
 * @param {string} one
 * @param {string} [many]
 */
export const formatCount = (count, one, many = `${one}s`) => `${formatWhole(count)} ${count === 1 ? one : many}`;

/**
 * Whole percents; 99.9 is not yet 100. Most shares are no exact numbers: 0.29 * 100 is a little less than 29.
 *
 * @param {number} share 0 to 1
 */
export const countPercent = (share) => Math.floor(share * 100 + 1e-9);
/** @param {number} share 0 to 1 */
export const formatPercent = (share) => `${countPercent(share)} %`;

/**
 * Enough decimals for the numbers of one column, the same for all of them.
 * @param {Row[]} rows
 * @param {string} name
 */
export function chooseDecimals(rows, name) {
  const sizes = [];
  for (const row of rows) if (typeof row[name] === "number") sizes.push(Math.abs(row[name]));
  if (sizes.every(Number.isInteger)) return 0;
  sizes.sort((a, b) => a - b);
  const middle = sizes[sizes.length >> 1] ?? 0;
  return middle >= LARGE ? 0 : middle >= 1 ? 2 : 4;
}

/**
 * What a scan was asked for, where it differs from what everybody gets.
 * @param {Pick<Snapshot, "scanner" | "params">} scan
 * @param {Record<string, any>} [schema] of its parameters
 */
export function describeParams({ scanner, params }, schema) {
  if (scanner === "external") return ""; // what it is about is its name
  const parts = [];
  for (const [name, value] of Object.entries(params)) {
    if (value === null || name === "title" || name === "unit" || name === "total") continue;
    if (schema !== undefined && JSON.stringify(schema.properties?.[name]?.default) === JSON.stringify(value)) continue;
    const text = typeof value === "number" ? formatPlain(value) : Array.isArray(value) ? (value.length > 6 ? formatCount(value.length, "symbol") : value.join(" ")) : `${value}`;
    parts.push(name === "where" ? text : Array.isArray(value) ? text : `${name} ${text}`);
  }
  return parts.length === 0 ? "all defaults" : parts.join(" · ");
}

/** @param {Pick<Snapshot, "scanner" | "params">} scan */
export const nameScan = ({ scanner, params }) =>
  scanner === "external" && typeof params.title === "string" ? params.title : scanner;

/** @param {string} dataVersion */
export const isSynthetic = (dataVersion) => dataVersion.startsWith("synthetic-");
