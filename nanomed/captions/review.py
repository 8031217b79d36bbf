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
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5b6877;--line:#dde3ea;--paper:#fff;--wrong:#fbe9e7;--flag:#a33}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#9aa7b5;--line:#333d48;--paper:#1a2027;--wrong:#43231f;
  --flag:#f0a05c}}
*{box-sizing:border-box}
body{font:16px/1.45 system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:1rem;color:var(--ink);
  background:var(--paper)}
h1{font-size:1.4rem;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
th{position:sticky;top:0;background:var(--paper);text-align:left;cursor:pointer;border-bottom:2px solid var(--soft);
  padding:.4rem}
td{vertical-align:top;border-bottom:1px solid var(--line);padding:.5rem .4rem;overflow-wrap:anywhere}
td img{width:240px;max-width:100%;display:block;border-radius:4px}
td:first-child{width:252px;min-width:252px}td:nth-child(3){min-width:16em}
tr.wrong td{background:var(--wrong)}.flag{color:var(--flag);font-weight:600;
  overflow-wrap:normal}
.name{color:var(--soft);font-size:.85em}
button{font:inherit;padding:.35rem .8rem}label{white-space:nowrap}
@media (max-width:700px){
  table,thead,tbody,tbody tr,td{display:block;width:100%}thead{position:sticky;top:0}
  thead tr{display:flex;overflow-x:auto;background:var(--paper)}th{position:static}
  td{border:0;padding:.15rem .4rem}tbody tr{border-bottom:1px solid var(--line);padding:.6rem 0}td:empty{display:none}
  td:nth-child(4),td:nth-child(5){display:inline-block;width:auto;color:var(--soft);font-size:.85em}
  td:nth-child(4)::after{content:" tokens"}td:nth-child(5)::before{content:"attempt "}}
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
  const of=r=>i==6?String(+r.querySelector('input').checked):r.cells[i].textContent.trim();
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
        link = html.escape(_link(paths[r.file_name], out.parent), quote=True)
        name, text = html.escape(r.file_name, quote=True), html.escape(r.text, quote=True)
        lines.append(
            f'<tr data-file="{name}" data-text="{text}"><td><img loading="lazy" alt="{name}" src="{link}">'
            f'<span class="name">{name}</span></td><td>{html.escape(r.category)}</td><td>{text}</td>'
            f'<td>{r.tokens}</td><td>{r.attempts}</td><td class="flag">{html.escape("; ".join(r.flags))}</td>'
            f'<td><label><input type="checkbox"> wrong</label></td></tr>'
        )
    heads = ("image", "category", "caption", "tokens", "attempt", "look at", "verdict")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(out.name)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(out.name)}</h1><p>Click a column to sort; tick what is wrong. "
        f'<button id="save">save the others as CSV</button> <span id="count"></span></p><table><thead><tr>'
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>\n{chr(10).join(lines)}\n</tbody></table>"
        f"<script>{SCRIPT}</script></html>\n"
    )


def _link(file: Path, folder: Path) -> str:
    """From a page in `folder` to a file; whole where the two are on different drives of Windows."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:
        return file.resolve().as_uri()
