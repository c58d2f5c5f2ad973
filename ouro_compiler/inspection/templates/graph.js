// The drawing: groups below each other, blocks folded or unfolded. Texts are set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const { names, facts, records, layouts, stages } = data;
const SVG = "http://www.w3.org/2000/svg";
const HALF = [data.node_size[0] / 2, data.node_size[1] / 2];
const HEAD = 30, PAD = 14, GAP = 34, BLOCK_WIDTH = 270;
const byId = (id) => document.getElementById(id);

function make(tag, attributes, text) {
  const svg = ["svg", "g", "rect", "text", "path", "title", "marker", "defs"].includes(tag);
  const found = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

// A stage's nodes by name: {name, facts, inputs, readers, lines, group}; built when first shown.
const built = new Map();
function nodesOf(index) {
  if (built.has(index)) return built.get(index);
  const nodes = new Map();
  stages[index].groups.forEach(([block, , members], group) => members.forEach((number, place) => {
    const [name, known, inputs, lines] = records[number];
    const node = { name: names[name], group, place, facts: {}, inputs: [], readers: [], lines: lines.map((one) => names[one]) };
    for (const one of known) node.facts[names[facts[one][0]]] = facts[one][1];
    for (let i = 0; i < inputs.length; i += 2) node.inputs.push([names[inputs[i]], names[inputs[i + 1]]]);
    nodes.set(node.name, node);
  }));
  for (const node of nodes.values()) for (const [source] of node.inputs) nodes.get(source)?.readers.push(node.name);
  built.set(index, nodes);
  return nodes;
}

const state = { stage: stages.length - 1, view: "after", colour: "kind", open: new Set(), zoom: 1, chosen: null, centre: null };
const shownStage = () => (state.view === "before" && state.stage > 0 ? state.stage - 1 : state.stage);

function kindOf(op) {
  const short = op.replace(/^(aten|ouro)\./, "").split(".")[0];
  if (op === "placeholder" || op === "output") return "ends";
  if (data.views.includes(short)) return "view";
  if (short.includes("linear")) return "linear";
  if (short.includes("scan") && !short.startsWith("cross")) return "scan";
  if (short.includes("quantize")) return "quantize";
  if (short.includes("conv")) return "conv";
  return "plain";
}

const bitsClass = (bits) => (bits === undefined ? "plain" : bits <= 4 ? "bits4" : bits <= 6 ? "bits6" : "bits8");
const errorOf = (node) => data.error[node.facts.layer];
// From 0 dB (red) to 40 dB (green); the ink on it is dark in both themes.
const errorColour = (snr) => `hsl(${Math.round(Math.max(0, Math.min(40, snr)) * 3)} 70% 70%)`;

function markOf(name) {
  if (state.stage === 0) return null;
  const sets = stages[state.stage].sets ??= Object.fromEntries(
    ["added", "removed", "changed"].map((key) => [key, new Set(stages[state.stage].diff[key].map((one) => names[one]))]));
  if (state.view === "after" && sets.added.has(name)) return "added";
  if (state.view === "before" && sets.removed.has(name)) return "removed";
  return sets.changed.has(name) ? "changed" : null;
}

const SIGNS = { added: "+", removed: "−", changed: "~" };
// Of a dotted name the end says most.
const clipped = (text, width) => (text.length <= width ? text
  : /\w\.\w/.test(text) ? "…" + text.slice(1 - width) : text.slice(0, width - 1) + "…");

function drawNode(node, x, y) {
  const group = make("g", { class: `node ${kindOf(String(node.facts.op))}`, transform: `translate(${x},${y})`, tabindex: 0, role: "button" });
  const rect = make("rect", { x: -HALF[0], y: -HALF[1], width: 2 * HALF[0], height: 2 * HALF[1], rx: 4 });
  const snr = errorOf(node);
  if (state.colour === "bits") group.classList.add(bitsClass(node.facts.bits));
  if (state.colour === "error") {
    if (snr === undefined) group.classList.add("plain");
    else rect.style.fill = errorColour(snr);
  }
  const mark = markOf(node.name);
  if (mark) group.classList.add(mark);
  if (state.chosen === node.name) group.classList.add("chosen");
  group.append(rect);
  const lines = node.lines.slice(0, 3);
  lines.forEach((line, index) => {
    const text = make("text", { "text-anchor": "middle", y: 4 + 13 * (index - (lines.length - 1) / 2) }, clipped(line, 27));
    if (state.colour === "error" && snr !== undefined) text.style.fill = "#1c1f24";
    group.append(text);
  });
  if (mark) group.append(make("text", { x: HALF[0] - 12, y: -HALF[1] + 14 }, SIGNS[mark]));
  group.append(make("title", {}, [node.name, ...node.lines].join("\n")));
  group.setAttribute("aria-label", [...node.lines, mark || ""].join(", "));
  group.dataset.name = node.name;
  return group;
}

function blockLabel(block, nodes, members, open) {
  const inside = members.map((number) => nodes.get(names[records[number][0]]));
  const bits = [...new Set(inside.map((node) => node.facts.bits).filter((one) => one !== undefined))].sort((a, b) => a - b);
  const snr = inside.map(errorOf).filter((one) => one !== undefined);
  return {
    text: `${open ? "▾" : "▸"} ${block} · ${members.length} nodes${bits.length ? ` · ${bits.join("/")} bit` : ""}`,
    bits: bits[0], snr: snr.length ? Math.min(...snr) : undefined,
    marks: new Set(inside.map((node) => markOf(node.name)).filter(Boolean)),
  };
}

const ends = new Map(); // of the drawing: where edges of a node leave and arrive

function draw() {
  const index = shownStage(), nodes = nodesOf(index), groups = stages[index].groups;
  const isOpen = (block) => block < 0 || state.open.has(names[block]);
  const sizes = groups.map(([block, layout]) => (!isOpen(block) ? [BLOCK_WIDTH, HEAD]
    : block < 0 ? [layouts[layout][0], layouts[layout][1]]
      : [Math.max(BLOCK_WIDTH, layouts[layout][0] + 2 * PAD), layouts[layout][1] + HEAD + 2 * PAD]));
  const widest = Math.max(...sizes.map(([width]) => width), BLOCK_WIDTH);
  const left = 70, centre = left + widest / 2;
  const layer = make("g"), lines = make("g"), boxes = make("g");
  ends.clear();
  let top = 16;
  groups.forEach(([block, layout, members], number) => {
    const [width, height] = sizes[number], [, , points] = layouts[layout];
    const open = isOpen(block), corner = [centre - width / 2, top];
    if (block >= 0) boxes.append(drawBlock(names[block], blockLabel(names[block], nodes, members, open), open, corner, width, height));
    const origin = [centre - layouts[layout][0] / 2, top + (block >= 0 ? HEAD + PAD : 0)];
    members.forEach((record, place) => {
      const name = names[records[record][0]];
      if (!open) { ends.set(name, { x: centre, top: corner[1], bottom: corner[1] + height, group: number, folded: true }); return; }
      const x = origin[0] + points[2 * place], y = origin[1] + points[2 * place + 1];
      ends.set(name, { x, y, top: y - HALF[1], bottom: y + HALF[1], group: number, origin });
      layer.append(drawNode(nodes.get(name), x, y));
    });
    top += height + GAP;
  });
  drawEdges(groups, nodes, lines, left);
  const svg = make("svg", { viewBox: `0 0 ${widest + left + 20} ${top}`, width: (widest + left + 20) * state.zoom, height: top * state.zoom });
  const arrow = make("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" });
  arrow.append(make("path", { d: "M0 0 L8 4 L0 8 z" }));
  const defs = make("defs");
  defs.append(arrow);
  svg.append(defs, boxes, lines, layer);
  // The middle of the drawing stays where it is on the screen, however wide the drawing becomes.
  const canvas = byId("canvas"), offset = state.centre === null ? canvas.clientWidth / 2 : state.centre - canvas.scrollLeft;
  const height = canvas.scrollTop;
  canvas.replaceChildren(svg);
  state.centre = centre * state.zoom;
  canvas.scrollLeft = state.centre - offset;
  canvas.scrollTop = height;
}

function drawBlock(block, label, open, [x, y], width, height) {
  const group = make("g", { class: "block", tabindex: 0, role: "button", "aria-expanded": open, "aria-label": `block ${label.text}` });
  const rect = make("rect", { x, y, width, height, rx: 6 });
  if (!open && state.colour === "bits") group.classList.add(bitsClass(label.bits));
  if (!open && state.colour === "error" && label.snr !== undefined) rect.style.fill = errorColour(label.snr);
  if (label.marks.size) rect.style.stroke = `var(--${[...label.marks][0]})`;
  const signs = [...label.marks].map((mark) => SIGNS[mark]).join("");
  const text = make("text", { x: x + width / 2, y: y + 20, "text-anchor": "middle" }, clipped(label.text, 44) + (signs ? `  ${signs}` : ""));
  if (!open && state.colour === "error" && label.snr !== undefined) text.style.fill = "#1c1f24";
  group.append(rect, text, make("title", {}, label.text));
  group.dataset.block = block;
  return group;
}

function drawEdges(groups, nodes, lines, left) {
  const bends = groups.map(([, layout]) => new Map(layouts[layout][3].map(([a, b, ...rest]) => [`${a},${b}`, rest])));
  const seen = new Set();
  let lane = 0;
  for (const node of nodes.values()) for (const [source, operands] of node.inputs) {
    const from = ends.get(source), to = ends.get(node.name);
    if (!from || !to || (from.folded && from.group === to.group)) continue;
    const key = `${from.folded ? from.group : source}>${to.folded ? to.group : node.name}`;
    if (seen.has(key)) continue;
    seen.add(key);
    let path = `M${from.x} ${from.bottom}`;
    if (from.group === to.group) {
      const rest = bends[from.group].get(`${nodes.get(source).place},${node.place}`) || [];
      let [x, y] = [from.x, from.bottom];
      for (let i = 0; i <= rest.length; i += 2) {
        const last = i === rest.length;
        const nx = last ? to.x : from.origin[0] + rest[i], ny = last ? to.top : from.origin[1] + rest[i + 1];
        path += ` C${x} ${(y + ny) / 2} ${nx} ${(y + ny) / 2} ${nx} ${ny}`;
        [x, y] = [nx, ny];
      }
    } else if (to.group === from.group + 1) {
      const middle = (from.bottom + to.top) / 2;
      path += ` C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${to.top}`;
    } else { // past other groups: along the left margin
      const x = left - 12 - 6 * (lane++ % 8);
      path += ` C${from.x} ${from.bottom + 24} ${x} ${from.bottom} ${x} ${from.bottom + 30} L${x} ${to.top - 30} C${x} ${to.top} ${to.x} ${to.top - 24} ${to.x} ${to.top}`;
    }
    const edge = make("path", { class: "edge", d: path, "marker-end": "url(#arrow)" });
    if (state.chosen && (state.chosen === source || state.chosen === node.name)) edge.classList.add("chosen");
    edge.append(make("title", {}, `${source} → ${node.name}${operands ? ` (${operands})` : ""}`));
    lines.append(edge);
  }
}
