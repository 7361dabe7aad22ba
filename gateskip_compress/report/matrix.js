(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll("#cells tbody tr")];
  const cells = data.cells, dash = "–";
  const make = (tag, text, name) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (name) e.className = name; return e; };
  for (const hidden of ["finder", "tools"]) at(hidden).hidden = false;

  // sorting
  const value = (cell, key) => key === "label" ? cell.label : key === "strength" || key === "saves" ? cell[key] || "" : key === "verdict" ? ["yes", "likely", "no", "unknown"].indexOf(verdict(cell)) : cell.values[key];
  const sortBy = (head) => {
    const key = head.dataset.key, metric = data.metrics[key];
    const before = head.getAttribute("aria-sort");
    const first = metric && metric.more_is_better ? "descending" : "ascending";
    const way = before === null ? first : before === "ascending" ? "descending" : "ascending";
    for (const other of document.querySelectorAll("#cells thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const x = value(cells[a.dataset.id], key), y = value(cells[b.dataset.id], key);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
    document.querySelector("#cells tbody").append(...rows);
  };
  for (const button of document.querySelectorAll("#cells thead button")) button.addEventListener("click", () => sortBy(button.parentNode));

  // the reader's own limits
  const asks = [...document.querySelectorAll("#finder input")];
  const scale = { perplexity_ratio: (v) => 1 + v / 100, accuracy_change: (v) => v / 100 };
  const limits = () => asks.filter((a) => a.value !== "" && !isNaN(a.value)).map((a) => {
    const metric = a.dataset.metric, own = scale[metric] || (data.metrics[metric].unit === "share" ? (v) => v / 100 : (v) => v);
    return { metric, sign: a.dataset.sign, value: own(Number(a.value)) };
  });
  const holds = (v, c) => c.sign === "<=" ? v <= c.value + 1e-9 : v >= c.value - 1e-9;
  const meets = (cell, c) => holds(cell.values[c.metric], c);
  const surely = (cell, asked) => asked.every((c) => (cell.bounds[c.metric] || []).every((end) => holds(end, c)));
  const misses = (cell, c) => meets(cell, c) ? 0 : Math.abs(cell.values[c.metric] - c.value) / (Math.abs(c.value) || 1);
  const verdict = (cell) => {
    const asked = limits();
    if (!asked.length) return cell.status === "done" ? (cell.verdicts[0] || "unknown") : "unknown";
    if (cell.status !== "done") return "unknown";
    if (asked.some((c) => c.metric in cell.values && !meets(cell, c))) return "no";
    return !asked.every((c) => c.metric in cell.values) ? "unknown" : surely(cell, asked) ? "yes" : "likely";
  };
  const able = () => Object.values(cells).filter((c) => c.status === "done" && c.kind !== "original");
  const opener = (cell) => { const b = make("button", cell.label, "open"); b.type = "button"; b.dataset.id = cell.id; return b; };
  const summary = (cell) => ["perplexity_ratio", "memory_share", "disk_share", "decode_speedup"].filter((m) => m in cell.values)
    .map((m) => `${data.metrics[m].label} ${cell.texts[m][0]}${data.metrics[m].unit === "×" ? " ×" : ""}`).join(", ");
  const find = () => {
    const asked = limits(), out = at("take");
    out.textContent = "";
    if (!asked.length) { out.append("Fill in what matters to you; leave the rest empty."); }
    else {
      const met = able().filter((c) => asked.every((a) => a.metric in c.values && meets(c, a)));
      const cost = (c) => c.values.cost_share === undefined ? Infinity : c.values.cost_share;
      if (met.length) {
        const sure = met.filter((c) => surely(c, asked));
        const best = (sure.length ? sure : met).reduce((a, b) => cost(b) < cost(a) ? b : a);
        out.append("Take ", opener(best), `: ${summary(best)}. ${met.length === 1 ? "The only one that meets this" : `Cheapest of ${met.length} that meet this`}${sure.length ? "." : ", though an interval reaches past it."}`);
      } else {
        const near = able().filter((c) => asked.every((a) => a.metric in c.values));
        const far = (c) => asked.reduce((sum, a) => sum + misses(c, a), 0);
        out.append("No stack here meets this. ");
        if (near.length) { const best = near.reduce((a, b) => far(b) < far(a) ? b : a); out.append("Nearest: ", opener(best), `: ${summary(best)}.`); }
      }
    }
    for (const row of rows) {
      const spot = row.cells[row.cells.length - 1], cell = cells[row.dataset.id];
      if (cell.status !== "done") continue;
      const said = verdict(cell), mark = make("span", said === "unknown" ? dash : said, said);
      spot.replaceChildren(mark);
    }
    filter();
  };
  for (const ask of asks) ask.addEventListener("input", find);

  // filtering
  const fronts = new Set(data.fronts);
  const shows = {
    "": () => true, done: (c) => c.status === "done", missed: (c) => c.status !== "done", front: (c) => fronts.has(c.id),
    saves: (c) => c.saves && c.saves !== "neither", goal: (c) => ["yes", "likely"].includes(verdict(c)),
  };
  const filter = () => {
    const parts = [...document.querySelectorAll("#tools [name=part]:checked")].map((box) => box.value);
    const strength = at("strength").value, text = at("find").value.trim().toLowerCase(), show = shows[at("show").value];
    let count = 0;
    for (const row of rows) {
      const cell = cells[row.dataset.id];
      const on = parts.every((p) => cell.parts.includes(p)) && (!strength || cell.strength === strength) && show(cell)
        && (!text || `${cell.label} ${cell.tag} ${cell.reason || ""}`.toLowerCase().includes(text));
      row.hidden = !on;
      count += on;
      for (const dot of document.querySelectorAll(`.dot[data-id="${cell.id}"]`)) dot.classList.toggle("off", !on);
    }
    at("count").textContent = `${count} of ${rows.length}`;
  };
  at("tools").addEventListener("input", filter);
  at("clear").addEventListener("click", () => {
    for (const box of document.querySelectorAll("#tools [name=part]")) box.checked = false;
    at("strength").value = ""; at("show").value = "done"; at("find").value = "";
    filter();
  });

  // one cell
  const table = (heads, lines) => {
    const t = make("table"), body = make("tbody");
    const top = make("tr");
    for (const head of heads) { const h = make("th", head); h.scope = "col"; top.append(h); }
    const thead = make("thead"); thead.append(top); t.append(thead, body);
    for (const [first, ...rest] of lines) {
      const line = make("tr"), h = make("th", first); h.scope = "row"; line.append(h);
      for (const item of rest) line.append(make("td", item));
      body.append(line);
    }
    return t;
  };
  const copied = (text) => {
    const box = make("div"), pre = make("pre", text), button = make("button", "copy");
    button.type = "button";
    button.addEventListener("click", () => { navigator.clipboard ? navigator.clipboard.writeText(text).then(() => { button.textContent = "copied"; }, () => getSelection().selectAllChildren(pre)) : getSelection().selectAllChildren(pre); });
    box.append(pre, button);
    return box;
  };
  const show = (id) => {
    const cell = cells[id], body = at("cell-body");
    at("cell-name").textContent = cell.label;
    body.textContent = "";
    if (cell.reason) body.append(make("h3", cell.status), make("p", cell.reason));
    if (cell.untimed) body.append(make("p", `not timed, ${cell.untimed}`));
    const two = make("div", undefined, "two"), left = make("div"), right = make("div");
    const known = Object.keys(cell.texts);
    if (known.length) left.append(make("h3", "Numbers"), table(["metric", "value", "interval"], known.map((m) => [`${data.metrics[m].label}${["×", "nats", "tokens/s", "ms", "s"].includes(data.metrics[m].unit) ? ", " + data.metrics[m].unit : ""}`, cell.texts[m][0], cell.texts[m][1] || dash])));
    right.append(make("h3", "To repeat it"), copied(cell.command), make("h3", "Recipe"), copied(cell.recipe_yaml));
    two.append(left, right); body.append(two);
    const speed = cell.raw.speed;
    if (speed && speed.sizes) {
      const each = (list) => list ? list.map((s) => (1000 * s).toPrecision(4)).join("  ") : dash, lines = [];
      for (const s of speed.sizes) {
        const name = `batch ${s.batch}, ${s.prompt_tokens} tokens`;
        if (s.refused) lines.push([name, s.refused, ""]);
        else for (const kind of ["prefill", "decode"]) lines.push([`${name}, ${kind}`, each(s[`${kind}_s`]), each(s[`original_${kind}_s`])]);
      }
      const wide = make("div", undefined, "wide"); wide.tabIndex = 0;
      wide.append(table(["samples, ms", "this cell", "original, in the same run"], lines));
      body.append(make("h3", "Timings"), wide);
    }
    const raw = make("details"); raw.append(make("summary", "all raw rows"), make("pre", JSON.stringify(cell.raw, null, 1)));
    body.append(raw);
    for (const other of document.querySelectorAll(".picked")) other.classList.remove("picked");
    for (const mine of document.querySelectorAll(`tr[data-id="${id}"], .dot[data-id="${id}"]`)) mine.classList.add("picked");
    at("cell").showModal();
    at("cell").scrollTop = 0;
  };
  document.addEventListener("click", (event) => {
    const target = event.target.closest(".open, .dot, #cells tbody tr");
    if (target && !getSelection().toString()) show(target.dataset.id);
  });
  at("close").addEventListener("click", () => at("cell").close());
  at("cell").addEventListener("click", (event) => { if (event.target === at("cell")) at("cell").close(); });

  // starts from the first goal, where it can be put into these limits
  const back = (c) => c.metric === "perplexity_ratio" ? 100 * (c.value - 1) : c.metric === "accuracy_change" || data.metrics[c.metric].unit === "share" ? 100 * c.value : c.value;
  const given = data.goal.map((c) => [c, asks.find((a) => a.dataset.metric === c.metric && a.dataset.sign === c.sign)]);
  if (given.every((pair) => pair[1])) for (const [c, ask] of given) ask.value = Number(back(c).toPrecision(6));
  find();
})();
