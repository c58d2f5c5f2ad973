// Choosing: stages, nodes, search, links from tables, sorting and filtering.
function nameButton(name, shown) {
  const button = make("button", { type: "button", class: "name" }, shown ?? name);
  button.addEventListener("click", () => choose(name));
  return button;
}

function showChange() {
  const place = byId("change"), stage = stages[state.stage];
  place.replaceChildren(make("h3", {}, stage.name));
  place.append(make("p", {}, `${stage.nodes} nodes${stage.changed ? "" : ", as before it"}`));
  const ops = Object.entries(stage.diff.ops);
  if (ops.length) place.append(make("p", {}, ops.map(([op, count]) => `${op} ${count > 0 ? "+" : "−"}${Math.abs(count)}`).join(", ")));
  for (const key of ["added", "removed", "changed"]) {
    const found = stage.diff[key];
    if (!found.length) continue;
    const box = make("details"), list = make("ul");
    box.append(make("summary", {}, `${SIGNS[key]} ${found.length} ${key}`), list);
    for (const one of found.slice(0, 200)) {
      const item = make("li"), button = nameButton(names[one]);
      button.addEventListener("click", () => setView(key === "removed" ? "before" : "after"), true);
      item.append(button);
      list.append(item);
    }
    if (found.length > 200) list.append(make("li", {}, `and ${found.length - 200} more`));
    place.append(box);
  }
}

function showDetails() {
  const place = byId("details"), node = nodesOf(shownStage()).get(state.chosen);
  if (!node) return;
  place.replaceChildren(make("h3", {}, node.name));
  const list = make("dl");
  const entry = (key, ...values) => { const dd = make("dd"); dd.append(...values); list.append(make("dt", {}, key), dd); };
  for (const [key, value] of Object.entries(node.facts)) entry(key, String(value));
  if (errorOf(node) !== undefined) entry("SNR (dB)", errorOf(node).toFixed(1));
  if (data.times[node.name] !== undefined) entry("ms", data.times[node.name].toPrecision(3));
  for (const [source, operands] of node.inputs) entry(operands || "input", nameButton(source));
  for (const reader of node.readers) entry("read by", nameButton(reader));
  for (const row of document.querySelectorAll("#layers-table tbody a")) {
    if (row.textContent !== node.facts.layer) continue;
    const link = make("a", { href: "#layers" }, "row in the table of layers");
    link.addEventListener("click", (event) => { event.preventDefault(); mark(row); });
    entry("layer", link);
  }
  if (node.facts.site && data.charts.some((one) => one.name === node.facts.site)) {
    entry("activation", make("a", { href: `#site=${encodeURIComponent(node.facts.site)}` }, "outliers and codes"));
  }
  place.append(list);
}

function mark(link) {
  document.querySelectorAll("tr.chosen").forEach((row) => row.classList.remove("chosen"));
  const row = link.closest("tr");
  row.classList.add("chosen");
  row.scrollIntoView({ block: "center" });
  link.focus({ preventScroll: true });
}

function showLegend() {
  const place = byId("legend"), entries = {
    kind: [["quantize", "quantizer"], ["linear", "linear"], ["scan", "scan"], ["conv", "convolution"], ["node", "other"], ["ends", "input, output"]],
    bits: [["bits4", "to 4 bit"], ["bits6", "5, 6 bit"], ["bits8", "7, 8 bit"], ["node", "floating point"]],
    error: [],
  }[state.colour];
  place.replaceChildren(...entries.map(([colour, text]) => {
    const span = make("span", {}, text), box = make("i");
    box.style.background = `var(--${colour})`;
    span.prepend(box);
    return span;
  }));
  if (state.colour === "error") for (const snr of [0, 10, 20, 30, 40]) {
    const span = make("span", {}, `${snr} dB`), box = make("i");
    box.style.background = errorColour(snr);
    span.prepend(box);
    place.append(span);
  }
  if (state.stage > 0) place.append(make("span", {}, "border: + added, − removed, ~ changed by the pass"));
}

function update() {
  draw();
  showLegend();
  showChange();
  showDetails();
  document.querySelectorAll("#stages button").forEach((one, index) => one.setAttribute("aria-current", index === state.stage));
}

function setView(view) {
  state.view = view;
  document.querySelector(`input[name=view][value=${view}]`).checked = true;
}

// Select a node where it is drawn; if this stage has none of that name, the last stage that has.
function choose(name) {
  if (!nodesOf(shownStage()).has(name)) {
    setView("after");
    const found = stages.map((_, index) => index).reverse().find((index) => nodesOf(index).has(name));
    if (found === undefined) return false;
    state.stage = found;
  }
  const node = nodesOf(shownStage()).get(name), block = stages[shownStage()].groups[node.group][0];
  if (block >= 0) state.open.add(names[block]);
  state.chosen = name;
  update();
  const drawn = [...document.querySelectorAll("#canvas .node")].find((one) => one.dataset.name === name);
  drawn?.focus({ preventScroll: true });
  drawn?.scrollIntoView({ block: "center", inline: "center" });
  return true;
}

function toggle(block) {
  if (!state.open.delete(block)) state.open.add(block);
  draw();
  [...document.querySelectorAll("#canvas .block")].find((one) => one.dataset.block === block)?.focus({ preventScroll: true });
}

byId("canvas").addEventListener("click", (event) => {
  const found = event.target.closest("[data-name], [data-block]");
  if (found) found.dataset.name !== undefined ? choose(found.dataset.name) : toggle(found.dataset.block);
});
byId("canvas").addEventListener("keydown", (event) => {
  const found = event.target.closest("[data-name], [data-block]");
  if (!found) return;
  const node = nodesOf(shownStage()).get(found.dataset.name);
  const next = { ArrowUp: node?.inputs[0]?.[0], ArrowDown: node?.readers[0] }[event.key];
  if (event.key === "Enter" || event.key === " ") node ? choose(node.name) : toggle(found.dataset.block);
  else if (next) choose(next);
  else return;
  event.preventDefault();
});

function search(text) {
  const wanted = text.trim().toLowerCase(), results = byId("results");
  results.hidden = !wanted;
  results.replaceChildren();
  if (!wanted) return;
  const found = [...nodesOf(shownStage()).values()].filter((node) =>
    [node.name, node.facts.op, node.facts.layer, node.facts.site, node.facts.block, node.facts.constants].some((one) => String(one ?? "").toLowerCase().includes(wanted)));
  for (const node of found.slice(0, 60)) {
    const item = make("li");
    item.append(nameButton(node.name, `${node.name} · ${node.facts.op}${node.facts.layer ? ` · ${node.facts.layer}` : ""}`));
    results.append(item);
  }
  results.append(make("li", {}, found.length ? `${found.length} found${found.length > 60 ? ", 60 shown" : ""}` : "nothing found in this stage"));
}
byId("search").addEventListener("input", (event) => search(event.target.value));
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") byId("results").querySelector("button")?.click();
  if (event.key === "Escape") { event.target.value = ""; search(""); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) { event.preventDefault(); byId("search").focus(); }
});

stages.forEach((stage, index) => {
  const item = make("li"), button = make("button", { type: "button", class: stage.changed ? "" : "same" }, stage.name);
  const { added, removed, changed } = stage.diff;
  const tally = index === 0 ? `${stage.nodes} nodes` : stage.changed ? `+${added.length} −${removed.length} ~${changed.length} · ${stage.nodes} nodes` : "changed nothing";
  button.append(make("span", { class: "tally" }, tally));
  button.addEventListener("click", () => { state.stage = index; state.chosen = null; update(); });
  item.append(button);
  byId("stages").append(item);
});
document.querySelectorAll("input[name=view]").forEach((one) => one.addEventListener("change", () => { state.view = one.value; update(); }));
byId("colour").addEventListener("change", (event) => { state.colour = event.target.value; update(); });
byId("unfold").addEventListener("click", () => { stages[shownStage()].groups.forEach(([block]) => block >= 0 && state.open.add(names[block])); draw(); });
byId("fold").addEventListener("click", () => { state.open.clear(); draw(); });
const zoom = (by) => () => { state.zoom = Math.max(0.2, Math.min(3, state.zoom * by)); draw(); };
byId("zoom-in").addEventListener("click", zoom(1.25));
byId("zoom-out").addEventListener("click", zoom(0.8));

document.querySelectorAll("[data-filter]").forEach((input) => input.addEventListener("input", () => {
  const wanted = input.value.trim().toLowerCase(), rows = [...byId(input.dataset.filter).tBodies[0].rows];
  rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
  document.querySelector(`[data-count="${input.dataset.filter}"]`).textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
}));
document.querySelectorAll("[data-sort]").forEach((button) => button.addEventListener("click", () => {
  const header = button.closest("th"), body = button.closest("table").tBodies[0], column = Number(button.dataset.sort);
  const down = header.getAttribute("aria-sort") === "ascending";
  button.closest("tr").querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[column].textContent.trim();
  const compare = (a, b) => (a === "" || b === "" ? (a === "") - (b === "") // what is empty stays last
    : (down ? -1 : 1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b));
  body.append(...[...body.rows].sort((one, two) => compare(value(one), value(two))));
}));

if (byId("site")) {
  byId("site").append(...data.charts.map((chart) => make("option", { value: chart.name }, chart.name)));
  byId("site").addEventListener("change", (event) => showSite(event.target.value));
  showSite(data.charts[0].name);
}
function follow() {
  const [key, coded] = location.hash.slice(1).split(/=(.*)/s);
  let value;
  try { value = decodeURIComponent(coded ?? ""); } catch { return; } // a hash that somebody typed
  if (key === "node" && value) { byId("graph").scrollIntoView(); choose(value); }
  if (key === "site" && value && showSite(value)) byId("site-charts").scrollIntoView({ block: "center" });
}
window.addEventListener("hashchange", follow);
// A link to where we already are changes no hash.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  if (link && link.getAttribute("href") === location.hash) follow();
});
update();
follow();
