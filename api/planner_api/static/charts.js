// One chart for each GPU type: the peak of reserved memory of every plan, beside what its allocator may reserve.
"use strict";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function bars(plans, group, colour) {
  const shown = plans.filter((plan) => plan.group === group);
  return {
    type: "bar",
    orientation: "h",
    width: 0.62,
    name: group,
    y: shown.map((plan) => plan.row),
    x: shown.map((plan) => plan.reserved_gib),
    customdata: shown.map((plan) => [plan.label, plan.batch_size, plan.allocated_gib, plan.capacity_gib]),
    hovertemplate:
      "%{customdata[0]}<br>batch size %{customdata[1]}<br>reserved %{x:.2f} GiB, allocated %{customdata[2]:.2f} GiB" +
      "<br>capacity %{customdata[3]:.2f} GiB<extra>" + group + "</extra>",
    marker: {
      color: colour,
      // A prediction is hatched: it never looks like a measurement, in black and white either.
      pattern: group === "predicted" ? { shape: "/", fillmode: "overlay", fgcolor: css("--card"), fgopacity: 0.75, size: 7, solidity: 0.22 } : {},
    },
    showlegend: shown.length > 0,
  };
}

function draw(figure) {
  const source = document.querySelector(`[data-chart-of="${CSS.escape(figure.dataset.chart)}"]`);
  const plans = JSON.parse(source.textContent).bars.map((plan, row) => ({ ...plan, row }));
  const narrow = figure.clientWidth < 560;
  const capacity = {
    type: "scatter",
    mode: "markers",
    name: "capacity",
    y: plans.map((plan) => plan.row),
    x: plans.map((plan) => plan.capacity_gib),
    marker: { symbol: "line-ns", size: 18, line: { width: 3, color: css("--limit") } },
    hovertemplate: "capacity %{x:.2f} GiB<extra></extra>",
  };
  const label = (plan) => {
    const text = `${plan.label} · batch ${plan.batch_size}`;
    return narrow ? text.replace(": ", ":<br>").replace(" + ", "<br>+ ").replace(" · ", "<br>") : text;
  };
  const layout = {
    height: 96 + plans.length * (narrow ? 52 : 34),
    margin: { l: 10, r: 16, t: 34, b: 46 },
    barmode: "overlay",
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--font"), size: narrow ? 11 : 13, color: css("--text") },
    xaxis: { title: { text: "peak reserved memory, GiB" }, rangemode: "tozero", gridcolor: css("--line"), zeroline: false, fixedrange: true },
    yaxis: {
      tickmode: "array",
      tickvals: plans.map((plan) => plan.row),
      ticktext: plans.map(label),
      autorange: "reversed",
      automargin: true,
      fixedrange: true,
    },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    hoverlabel: { align: "left" },
  };
  const traces = [bars(plans, "measured", css("--measured")), bars(plans, "predicted", css("--predicted")), capacity];
  return Plotly.react(figure, traces, layout, { responsive: true, displayModeBar: false });
}

function drawAll() {
  document.querySelectorAll("[data-chart]").forEach(draw);
}

drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
