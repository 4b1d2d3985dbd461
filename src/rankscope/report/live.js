// On a watched page: fetch news and redraw what has changed. Text is inserted as text alone.
const drawn = {};
function fill(now) {
  const lines = document.getElementById("now-lines"), body = document.getElementById("now-rows");
  lines.replaceChildren(...now.lines.map(line => Object.assign(document.createElement("li"), {textContent: line})));
  document.getElementById("now-bar").value = now.share;
  document.getElementById("now-left").textContent = now.left;
  document.getElementById("now-so-far").textContent = now.so_far;
  body.replaceChildren(...now.rows.map(cells => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell, place) => {
      const made = document.createElement(place ? "td" : "th");
      if (place > 1) made.className = "number";
      if (!place) made.scope = "row";
      made.textContent = cell;
      return made;
    }));
    return row;
  }));
}
async function redraw(id, spec) {
  const text = JSON.stringify(spec);
  if (drawn[id] === text || !document.getElementById(id).checkVisibility()) return;
  await draw(id, spec);
  drawn[id] = text;
}
async function ask() {
  let wait = 2000;
  try {
    const answer = await fetch("news.json");
    if (answer.ok) {
      const news = await answer.json();
      wait = news.again_ms;
      const known = Object.keys(news.charts).every(id => document.getElementById(id));
      if (news.now.part !== page.now.part || !known) { location.reload(); return; }
      fill(news.now);
      for (const [id, spec] of Object.entries(news.charts)) await redraw(id, spec);
    }
    document.getElementById("now-lost").hidden = true;
  } catch { document.getElementById("now-lost").hidden = false; }
  setTimeout(ask, wait);
}
fill(page.now);
setTimeout(ask, 1000);
