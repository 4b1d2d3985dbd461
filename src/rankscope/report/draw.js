// Draw the charts over those that lie in the page, where they are seen. Their colours are the page's CSS variables, so
// that a change of theme redraws nothing. A screen reader reads a chart's label and table, not Vega's words for its groups.
const page = JSON.parse(document.getElementById("page-data").textContent);
const views = {};
async function draw(id, spec) {
  const place = document.getElementById(id);
  const made = await vegaEmbed(place, spec, {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false,
    config: page.theme, tooltip: {disableDefaultStyle: true},
  });
  place.setAttribute("role", "group");
  place.removeAttribute("aria-roledescription");
  place.querySelector("svg").setAttribute("aria-hidden", "true");
  views[id] = made.view;
}
function drawWhenSeen(id, spec) {
  const fold = document.getElementById(id).closest("details:not([open])");
  if (fold) fold.addEventListener("toggle", () => drawWhenSeen(id, spec), {once: true}); else draw(id, spec);
}
for (const [id, spec] of Object.entries(page.charts)) drawWhenSeen(id, spec);
