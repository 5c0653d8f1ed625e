// @ts-check
/** The form of a scan, made from the JSON Schema of the scanner's parameters. */

import { find, make, setText } from "./dom.js";
import { formatShort } from "./format.js";

/** @typedef {Record<string, any>} Schema */
/** @typedef {{ name: string, schema: Schema, base: Schema, input: HTMLInputElement | HTMLSelectElement, amount: HTMLElement, error: HTMLElement }} Field */

const COMMON = ["start", "end", "symbols", "where"]; // what every scanner of the market takes
const PRESET = "preset"; // a choice of its own, above the fields that it fills
const PLAIN_BOUND = 1e6; // a bound beyond it is there for the server's sake
const LARGE = 10_000; // an amount beyond it is hard to read without a word
const LIST = /[\s,;]+/;

export class Form {
  #box;
  /** @type {Field[]} */
  #fields = [];

  /** @param {HTMLElement} box */
  constructor(box) {
    this.#box = box;
  }

  /**
   * @param {Schema} schema of the parameters of one scanner
   * @param {Record<string, string>} features that `where` knows
   */
  show(schema, features) {
    const names = Object.keys(schema.properties).filter((name) => name !== PRESET);
    this.#fields = names.map((name) => makeField(name, schema.properties[name]));
    const common = this.#fields.filter(({ name }) => COMMON.includes(name));
    const own = this.#fields.filter(({ name }) => !COMMON.includes(name));
    const groups = [];
    if (common.length > 0) groups.push(makeGroup("Which matches", "common", common));
    if (common.some(({ name }) => name === "where")) groups.push(this.#makeFeatures(features));
    if (own.length > 0) groups.push(makeGroup(common.length > 0 ? "Thresholds" : "Parameters", "own", own));
    this.#box.replaceChildren(...groups);
    for (const field of this.#fields) {
      field.input.addEventListener("input", () => this.#note(field));
      // Said to who goes on to the next field: under a press on the button below, nothing may grow and move it away.
      field.input.addEventListener("blur", (event) => {
        const next = /** @type {FocusEvent} */ (event).relatedTarget;
        if (next instanceof Node && this.#box.contains(next)) setError(field, checkField(field));
      });
    }
    this.fill({});
  }

  /**
   * What `values` does not name gets its default.
   * @param {Record<string, unknown>} values
   */
  fill(values) {
    for (const field of this.#fields) {
      const value = values[field.name] ?? field.schema.default ?? null;
      if (field.base.type === "boolean") /** @type {HTMLInputElement} */ (field.input).checked = value === true;
      else field.input.value = value === null ? "" : Array.isArray(value) ? value.join(" ") : `${value}`;
      setError(field, "");
      this.#note(field);
    }
  }

  /** What differs from the defaults; null when something cannot be right, which is then said beside its field. */
  read() {
    /** @type {Record<string, unknown>} */
    const params = {};
    let isRight = true;
    for (const field of this.#fields) {
      const problem = checkField(field);
      setError(field, problem);
      if (problem !== "" && isRight) field.input.focus();
      isRight &&= problem === "";
      const value = readValue(field);
      if (JSON.stringify(value) !== JSON.stringify(field.schema.default ?? null)) params[field.name] = value;
    }
    return isRight ? params : null;
  }

  /**
   * Puts each error beside its field; those that have none come back.
   * @param {{ field: string, message: string }[]} errors
   */
  showErrors(errors) {
    const rest = [];
    let isFirst = true;
    for (const error of errors) {
      const name = error.field.replace(/^params\./, "").split(".")[0];
      const field = this.#fields.find((one) => one.name === name);
      if (field === undefined) {
        rest.push(error);
        continue;
      }
      setError(field, error.message);
      if (isFirst) field.input.focus();
      isFirst = false;
    }
    return rest;
  }

  /** @param {Field} field */
  #note(field) {
    const value = readValue(field);
    const isChanged = JSON.stringify(value) !== JSON.stringify(field.schema.default ?? null);
    setText(field.amount, typeof value === "number" && Math.abs(value) >= LARGE ? formatShort(value) : "");
    field.input.closest(".field")?.classList.toggle("changed", isChanged);
  }

  /** @param {Record<string, string>} features */
  #makeFeatures(features) {
    const list = make("ul", { class: "features" });
    for (const [name, text] of Object.entries(features)) {
      const button = make("button", { type: "button", class: "small", title: text }, name);
      button.addEventListener("click", () => {
        const where = this.#fields.find((field) => field.name === "where");
        if (where === undefined) return;
        where.input.value = `${where.input.value} ${name}`.trimStart();
        where.input.focus();
        this.#note(where);
      });
      list.append(make("li", {}, button));
    }
    const summary = make("summary", {}, `What “where” knows beside the prices: ${Object.keys(features).length} features`);
    return make("details", { class: "feature-box" }, summary, list);
  }
}

/**
 * @param {string} title
 * @param {string} kind
 * @param {Field[]} fields
 */
function makeGroup(title, kind, fields) {
  const boxes = fields.map(({ name, schema, base, input, amount, error }) => {
    const label = make("label", { for: input.id }, nameField(name, schema));
    const hint = make("p", { class: "hint", id: `${input.id}-hint` }, describe(schema, base));
    return make("div", { class: `field ${base.type === "boolean" ? "flag" : ""} field-${name}` }, label, amount, input, hint, error);
  });
  return make("fieldset", { class: kind }, make("legend", {}, title), ...boxes);
}

/**
 * @param {string} name
 * @param {Schema} schema
 * @returns {Field}
 */
function makeField(name, schema) {
  // What may be left out is written as "this, or null".
  const base = schema.anyOf?.find((/** @type {Schema} */ one) => one.type !== "null") ?? schema;
  const id = `field-${name}`;
  const shared = { id, name, "aria-describedby": `${id}-hint ${id}-error`, autocomplete: "off", spellcheck: "false" };
  const error = make("p", { class: "error", id: `${id}-error` });
  const amount = make("span", { class: "amount", "aria-hidden": "true" });
  return { name, schema, base, input: makeInput(shared, base, schema), amount, error };
}

/**
 * @param {Record<string, string>} shared
 * @param {Schema} base
 * @param {Schema} schema
 */
function makeInput(shared, base, schema) {
  const choices = base.enum ?? (base.const === undefined ? null : [base.const]);
  if (choices !== null) {
    const options = choices.map((/** @type {string} */ choice) => make("option", { value: choice }, choice));
    return make("select", shared, ...(schema.anyOf ? [make("option", { value: "" }, "–")] : []), ...options);
  }
  if (base.type === "boolean") return make("input", { ...shared, type: "checkbox" });
  if (base.type === "number" || base.type === "integer") {
    const step = base.type === "integer" ? 1 : "any";
    const [min, max] = [base.minimum ?? base.exclusiveMinimum, base.maximum ?? base.exclusiveMaximum];
    return make("input", { ...shared, type: "number", inputmode: "decimal", step, min, max, required: !schema.anyOf });
  }
  if (base.format === "date") return make("input", { ...shared, type: "date" });
  return make("input", { ...shared, type: "text", maxlength: base.maxLength, required: (base.minLength ?? 0) > 0 });
}

/**
 * @param {string} name
 * @param {Schema} schema
 */
function nameField(name, schema) {
  return String(schema.title ?? name);
}

/**
 * @param {Schema} schema
 * @param {Schema} base
 */
function describe(schema, base) {
  const said = String(schema.description ?? "");
  const text = base.format === "date" ? said.replace(/, YYYY-MM-DD$/, "") : said; // its input has a way of its own to write it
  const [low, high] = [base.minimum ?? base.exclusiveMinimum, base.maximum ?? base.exclusiveMaximum];
  if (low === undefined && high === undefined) return text;
  const isOpen = high === undefined || high >= PLAIN_BOUND;
  const bounds = isOpen ? `${formatShort(low ?? 0)} or more` : `${formatShort(low ?? 0)} to ${formatShort(high)}`;
  return text === "" ? bounds : `${text} · ${bounds}`;
}

/** @param {Field} field */
function readValue({ base, schema, input }) {
  if (base.type === "boolean") return /** @type {HTMLInputElement} */ (input).checked;
  const text = input.value.trim();
  if (text === "") return schema.anyOf ? null : (schema.default ?? null);
  if (base.type === "number" || base.type === "integer") return Number(text);
  if (base.type === "array") return text.split(LIST).filter((part) => part !== "");
  return text;
}

/** @param {Field} field */
function checkField({ input, base }) {
  if (base.const !== undefined || base.enum !== undefined || input.validity.valid) return "";
  return input.validationMessage;
}

/**
 * @param {Field} field
 * @param {string} message
 */
function setError({ input, error }, message) {
  setText(error, message);
  if (message === "") input.removeAttribute("aria-invalid");
  else input.setAttribute("aria-invalid", "true");
}

/** @param {string} message about the form as a whole; none when empty */
export function sayError(message) {
  find("refusal").hidden = message === "";
  setText(find("form-error"), message);
  setText(find("form-when"), "");
}
