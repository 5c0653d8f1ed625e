// @ts-check
/** Elements, made and filled with text alone: nothing that came over the wire is ever read as markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * The element with this id, which the page has.
 * @param {string} id
 */
export function find(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`The page has no element ${id}.`);
  return element;
}

/** @param {string} id */
export const findInput = (id) => /** @type {HTMLInputElement} */ (find(id));
/** @param {string} id */
export const findSelect = (id) => /** @type {HTMLSelectElement} */ (find(id));
/** @param {string} id */
export const findButton = (id) => /** @type {HTMLButtonElement} */ (find(id));
/** @param {string} id */
export const findLink = (id) => /** @type {HTMLAnchorElement} */ (find(id));

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number | boolean | null | undefined>} [attributes] null, undefined and false: not there
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  setAttributes(element, attributes);
  element.append(...children);
  return element;
}

/**
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number | boolean | null | undefined>} [attributes]
 * @param {...(Node | string)} children
 * @returns {SVGElementTagNameMap[Tag]}
 */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  setAttributes(element, attributes);
  element.append(...children);
  return element;
}

/**
 * @param {Element} element
 * @param {Record<string, string | number | boolean | null | undefined>} attributes
 */
function setAttributes(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : `${value}`);
  }
}

/**
 * Touches the page only where something changes.
 * @param {Node} node
 * @param {string} text
 */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * A moment for people, in their own time; in UTC on hover.
 * @param {number} ts milliseconds since 1970
 * @param {Intl.DateTimeFormat} format
 */
export function makeTime(ts, format) {
  const at = new Date(ts);
  const utc = at.toISOString();
  return make("time", { datetime: utc, title: `${utc.slice(0, 19).replace("T", " ")} UTC` }, format.format(at));
}
