"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const body = document.querySelector("#cases tbody");
  const rows = body ? [...body.rows] : [];
  const caseOf = (i) => rows[i].querySelector(".case button").textContent;

  // Elements are made, never parsed from text: what a kernel says stays text.
  const make = (name, props = {}, ...children) => {
    const made = Object.assign(document.createElement(name), props);
    made.append(...children);
    return made;
  };

  // --- details of a case, below its row
  const details = (i) => {
    const d = data[i];
    const cell = make("td", { colSpan: 6 });
    if (d.d) cell.append(make("p", { className: "detail", textContent: d.d }));
    const errors = Object.entries(d.e);
    if (errors.length) {
      const table = make("table", {}, make("tr", {}, ...["criterion", "error", "budget"].map((t, n) => make("th", { textContent: t, className: n ? "num" : "" }))));
      for (const [name, [error, budget]] of errors)
        table.append(make("tr", {}, make("td", { textContent: name }), make("td", { textContent: error, className: "num" }), make("td", { textContent: budget, className: "num" })));
      cell.append(table);
    }
    const said = Object.entries(d.c).map(([name, what]) => `${name}: ${what}`);
    cell.append(make("p", { className: "quiet", textContent: [`${d.n} checks ok`, ...said].join(" · ") }));
    const facts = [d.k && `kernel ${d.k}`, d.a.length && `claims ${d.a.join(", ")}`, d.w && `waiver ${d.w}`, d.i && `inputs ${d.i.slice(0, 16)}`];
    cell.append(make("p", { className: "quiet", textContent: facts.filter(Boolean).join(" · ") }));
    cell.append(make("p", { className: "repro" }, make("code", { textContent: d.r }), make("button", { type: "button", textContent: "Copy" })));
    cell.querySelector(".repro button").dataset.copy = "";
    return make("tr", { className: "more" }, cell);
  };
  const close = (row) => {
    const next = row.nextElementSibling;
    if (next && next.className === "more") next.remove();
    row.querySelector(".case button").setAttribute("aria-expanded", "false");
  };
  const open = (i) => {
    close(rows[i]);
    rows[i].after(details(i));
    rows[i].querySelector(".case button").setAttribute("aria-expanded", "true");
  };
  const go = (i) => {
    if (rows[i].hidden) reset();
    open(i);
    rows[i].scrollIntoView({ block: "center" });
  };

  // --- filters, for the table and the dots alike
  const dots = [...document.querySelectorAll(".dot[data-i]")];
  const text = document.getElementById("text");
  const chips = [...document.querySelectorAll(".chips button")];
  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = chips.filter((c) => c.getAttribute("aria-pressed") === "true").map((c) => c.dataset.verdict);
    let shown = 0;
    rows.forEach((row, i) => {
      close(row);
      const all = `${row.textContent} ${data[i].d} ${Object.values(data[i].c).join(" ")}`.toLowerCase();
      const hit = (!wanted.length || wanted.includes(row.dataset.v)) && words.every((w) => all.includes(w));
      row.hidden = !hit;
      shown += hit;
    });
    for (const dot of dots) dot.classList.toggle("off", rows[dot.dataset.i].hidden);
    document.getElementById("shown").textContent = shown === rows.length ? shown : `${shown} of ${rows.length}`;
  };
  const reset = () => {
    text.value = "";
    for (const c of chips) c.setAttribute("aria-pressed", "false");
    filter();
  };
  if (text) {
    text.addEventListener("input", filter);
    text.form.addEventListener("submit", (event) => event.preventDefault());
  }
  for (const chip of chips)
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") === "true" ? "false" : "true");
      filter();
    });

  // --- sorting
  const value = { v: (r) => r.dataset.v, c: (r) => r.cells[1].textContent, k: (r) => r.cells[2].textContent, e: (r) => +r.dataset.e, t: (r) => +r.dataset.t, l: (r) => +r.dataset.l };
  for (const button of document.querySelectorAll("#cases th button"))
    button.addEventListener("click", () => {
      const th = button.parentElement, key = button.dataset.key, numeric = "etl".includes(key);
      const descending = th.getAttribute("aria-sort") === "none" ? numeric : th.getAttribute("aria-sort") === "ascending";
      for (const other of th.parentElement.cells) other.setAttribute("aria-sort", "none");
      th.setAttribute("aria-sort", descending ? "descending" : "ascending");
      rows.forEach(close);
      const sorted = [...rows].sort((a, b) => {
        const x = value[key](a), y = value[key](b);
        return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
      });
      body.append(...sorted);
    });

  // --- the name of a dot
  const tip = document.getElementById("tip");
  const show = (dot) => {
    const i = dot.dataset.i, row = rows[i], d = data[i];
    const over = Object.entries(d.e).filter(([, [e, b]]) => +e > 0 && +e > +b).map(([name]) => name);
    tip.replaceChildren(make("b", { textContent: caseOf(i) }), ` ${row.dataset.v}, ${row.cells[3].textContent} of budget${over.length ? `, over in ${over.join(", ")}` : ""}`);
    if (dot.closest(".roof")) tip.append(`, ${row.cells[4].textContent}, ${row.cells[5].textContent} of limit`);
    tip.hidden = false;
    const at = dot.getBoundingClientRect(), box = tip.getBoundingClientRect(), edge = 8;
    const left = Math.min(Math.max(at.left + at.width / 2 - box.width / 2, edge), document.documentElement.clientWidth - box.width - edge);
    const above = at.top - box.height - edge;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above < edge ? at.bottom + edge : above) + scrollY}px`;
  };
  document.addEventListener("pointerover", (event) => {
    const dot = event.target.closest(".dot[data-i]");
    if (dot) show(dot);
    else tip.hidden = true;
  });

  // --- clicks
  document.addEventListener("click", (event) => {
    const dot = event.target.closest(".dot[data-i]");
    const copy = event.target.closest("[data-copy]");
    const link = event.target.closest("[data-go]");
    const expand = event.target.closest(".case button");
    if (dot && event.pointerType === "touch") show(dot);
    else if (dot) go(+dot.dataset.i);
    else if (link) {
      event.preventDefault();
      go(+link.dataset.go);
    } else if (copy) {
      const code = copy.parentElement.querySelector("code");
      const done = () => {
        copy.textContent = "Copied";
        setTimeout(() => (copy.textContent = "Copy"), 1500);
      };
      // A page opened from a file may not write to the clipboard: then the text is at least selected.
      const select = () => getSelection().selectAllChildren(code);
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select);
      else select();
    } else if (expand) {
      const row = expand.closest("tr");
      if (expand.getAttribute("aria-expanded") === "true") close(row);
      else open(rows.indexOf(row));
    }
    const target = event.target.closest('.labels a[href^="#f"]');
    const hidden = target && document.querySelector(target.getAttribute("href"))?.closest("details");
    if (hidden) hidden.open = true;
  });
})();
