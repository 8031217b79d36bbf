"""A page that shows every image beside its caption, for a person who ticks what is wrong.

One file without a server: images are linked from where they are, rows sort by any column, and the button saves a CSV
of what was not ticked, in the form that `--captions` reads. Ticks are kept by the browser.
"""

import html
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from nanomed.captions.vsg import Picture, Result

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem;color:#222;background:#fff}
table{border-collapse:collapse;width:100%}
th{position:sticky;top:0;background:#fff;text-align:left;cursor:pointer;border-bottom:2px solid #888;padding:.4rem}
td{vertical-align:top;border-bottom:1px solid #ddd;padding:.5rem .4rem}
td img{max-width:260px;max-height:260px;display:block}
tr.wrong td{background:#fbe9e7}.flag{color:#a33;font-weight:600}.name{color:#666;font-size:.85em;word-break:break-all}
button{font:inherit;padding:.35rem .8rem}
"""
SCRIPT = """
const rows=()=>[...document.querySelectorAll('tbody tr')],key='wrong '+document.title;
const wrong=new Set(JSON.parse(localStorage.getItem(key)||'[]'));
function show(){rows().forEach(r=>{const w=wrong.has(r.dataset.file);r.classList.toggle('wrong',w);
  r.querySelector('input').checked=w});
  document.getElementById('count').textContent=wrong.size+' of '+rows().length+' marked as wrong'}
document.addEventListener('change',e=>{const r=e.target.closest('tr');if(!r)return;
  e.target.checked?wrong.add(r.dataset.file):wrong.delete(r.dataset.file);
  localStorage.setItem(key,JSON.stringify([...wrong]));show()});
document.querySelectorAll('th').forEach((th,i)=>{let up=1;th.addEventListener('click',()=>{
  const of=r=>r.cells[i].dataset.value??r.cells[i].textContent.trim();
  const sorted=rows().sort((a,b)=>up*of(a).localeCompare(of(b),undefined,{numeric:true}));up=-up;
  document.querySelector('tbody').append(...sorted)})});
document.getElementById('save').addEventListener('click',()=>{
  const q=s=>'"'+s.replaceAll('"','""')+'"';
  const kept=rows().filter(r=>!wrong.has(r.dataset.file)).map(r=>q(r.dataset.file)+','+q(r.dataset.text));
  const a=document.createElement('a');
  a.href=URL.createObjectURL(new Blob(['file_name,text\\n'+kept.join('\\n')+'\\n'],{type:'text/csv'}));
  a.download='captions.reviewed.csv';a.click()});
show();
"""


def page(results: Iterable[Result], pictures: Iterable[Picture], out: Path) -> str:
    """The page as HTML, to lie beside `out`."""
    paths = {picture.name: picture.path for picture in pictures}
    lines = []
    for r in results:
        if not r.text or r.file_name not in paths:
            continue
        link = html.escape(quote(os.path.relpath(paths[r.file_name], out.parent)), quote=True)
        name, text = html.escape(r.file_name, quote=True), html.escape(r.text, quote=True)
        lines.append(
            f'<tr data-file="{name}" data-text="{text}"><td><img loading="lazy" alt="{name}" src="{link}">'
            f'<span class="name">{name}</span></td><td>{html.escape(r.category)}</td><td>{text}</td>'
            f'<td>{r.tokens}</td><td>{r.attempts}</td><td class="flag">{html.escape("; ".join(r.flags))}</td>'
            f'<td data-value="0"><label><input type="checkbox"> wrong</label></td></tr>'
        )
    heads = ("image", "category", "caption", "tokens", "attempt", "look at", "verdict")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(out.name)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(out.name)}</h1><p>Click a column to sort; tick what is wrong. "
        f'<button id="save">save the others as CSV</button> <span id="count"></span></p><table><thead><tr>'
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>\n{chr(10).join(lines)}\n</tbody></table>"
        f"<script>{SCRIPT}</script></html>\n"
    )
