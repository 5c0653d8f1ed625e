"""A bar chart as SVG, made by hand: nothing is needed to draw a few rectangles."""

from collections.abc import Mapping
from html import escape

WIDTH, LABEL, BAR, GAP, TITLE = 860, 270, 20, 6, 40
OWN, OTHER, FLOOR = "#2563eb", "#94a3b8", "#475569"


def draw_costs(costs: Mapping[str, Mapping[str, float]]) -> str:
    """The CPU time of the server for each delivery: a group of bars for each work, cheapest first."""
    parts, y = [], 0
    for work, servers in costs.items():
        y += TITLE
        parts.append(f'<text x="8" y="{y - 10}" class="title">{escape(work)}: server CPU, µs per delivery</text>')
        scale = (WIDTH - LABEL - 70) / max(servers.values())
        for name, cost in sorted(servers.items(), key=lambda item: item[1]):
            color = OWN if name.startswith("Scanwire") else FLOOR if "floor" in name else OTHER
            middle = y + BAR - 5
            parts.append(f'<text x="{LABEL - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{cost * scale:.1f}" height="{BAR}" fill="{color}"/>')
            parts.append(f'<text x="{LABEL + cost * scale + 6:.1f}" y="{middle}">{cost:.1f}</text>')
            y += BAR + GAP
    height = y + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">\n'
        "<style>text{font:13px system-ui,sans-serif;fill:#334155}.title{font-weight:600;font-size:15px}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
