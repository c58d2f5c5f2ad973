// Of one activation: where its outliers are over time, and which codes it uses.
function bytes(text) {
  return Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
}

function heatMap(chart) {
  const figure = make("figure"), [rows, columns] = chart.bins;
  const canvas = make("canvas", { width: rows, height: columns, role: "img", "aria-label": `outliers of ${chart.name}` });
  const context = canvas.getContext("2d"), image = context.createImageData(rows, columns), shares = bytes(chart.heat);
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim();
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  for (let time = 0; time < rows; time++) for (let channel = 0; channel < columns; channel++) {
    image.data.set([red, green, blue, shares[time * columns + channel]], 4 * (channel * rows + time));
  }
  context.putImageData(image, 0, 0);
  const [steps, channels] = chart.shape;
  figure.append(canvas, make("figcaption", {}, `Outlier channels: time steps 0 to ${steps - 1} from left to right, channels 0 to ${channels - 1} from top to bottom; `
    + `full colour: listed in every image. ${columns < channels || rows < steps ? `A cell is the largest share among up to ${Math.ceil(steps / rows)} steps and ${Math.ceil(channels / columns)} channels.` : ""}`));
  return figure;
}

function histogram(title, first, counts, outlier) {
  const figure = make("figure"), width = 640, height = 130, most = Math.max(...counts), total = counts.reduce((a, b) => a + b, 0);
  const svg = make("svg", { class: "bars", viewBox: `0 0 ${width} ${height + 20}`, width, height: height + 20, role: "img", "aria-label": title });
  const step = width / counts.length;
  counts.forEach((count, index) => {
    const tall = (height * count) / most;
    const bar = make("rect", { x: index * step, y: height - tall, width: Math.max(1, step - 1), height: tall, class: outlier ? "outlier" : "" });
    bar.append(make("title", {}, `code ${first + index}: ${count} (${((100 * count) / total).toFixed(2)} %)`));
    svg.append(bar);
    if (counts.length <= 32 || (first + index) % 16 === 0) svg.append(make("text", { x: (index + 0.5) * step, y: height + 15, "text-anchor": "middle" }, String(first + index)));
  });
  figure.append(svg, make("figcaption", {}, `${title}, ${total.toLocaleString("en")} of them`));
  return figure;
}

function showSite(name) {
  const chart = data.charts.find((one) => one.name === name), place = byId("site-charts");
  if (!chart || !place) return false;
  byId("site").value = name;
  place.replaceChildren(make("h3", {}, name));
  if (chart.heat) place.append(heatMap(chart));
  else place.append(make("p", {}, chart.bins ? "No channel was an outlier on these images." : "This method has no outliers."));
  if (chart.inliers) place.append(histogram("Codes of inliers", chart.inliers[0], chart.inliers[1], false));
  if (chart.outliers) place.append(histogram("Codes of outliers", chart.outliers[0], chart.outliers[1], true));
  return true;
}
