"""What the demo shows at its end: the comparison, two answers, and how to do the same by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.comparison import place, title
from demo.client import Client

BAR_WIDTH = 10


def show_comparison(console: Console, shadow: dict[str, Any], direct: dict[str, Any]) -> None:
    """One table a set: every variant of both jobs, loss beside exact and content match."""
    console.rule("Untouched, grafted and directly tuned, side by side")
    for name, measured in shadow["sets"].items():
        console.print(_set_table(name, measured, direct["sets"][name]))
    console.print(
        f"[bold]Shadow-FT x {shadow['scale']:g} (published):[/] {shadow['verdict']['summary']}", highlight=False
    )
    console.print(f"[bold]Direct:[/] {direct['verdict']['summary']}", highlight=False)


def _set_table(name: str, shadow: dict[str, Any], direct: dict[str, Any]) -> Table:
    table = Table(title=f"{name} ({shadow['rows']} rows)", title_justify="left")
    table.add_column("model", min_width=24)
    table.add_column("loss", justify="right")
    if shadow["exact_match_measured"]:
        table.add_column("exact match")
        table.add_column("content match")
    results = {**shadow["results"], "direct": direct["results"]["direct"]}
    for variant in sorted(results, key=place):
        result = results[variant]
        table.add_row(title(variant), f"{result['loss']:.3f}", *_matches(result))
    return table


def _matches(result: dict[str, Any]) -> list[str]:
    shares = [result.get("exact_match"), result.get("content_match")]
    return [f"{_bar(share)} {share:.2f}" for share in shares if share is not None]


def _bar(share: float) -> str:
    filled = round(share * BAR_WIDTH)
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def show_answers(console: Console, question: str, before: str, after: str) -> None:
    console.rule("One answer, before and after")
    console.print(f"Question: {question}", markup=False)
    console.print(f"Untouched instruct:  {before}", markup=False)
    console.print(f"Downloaded model:    {after}", markup=False)


def show_next_steps(console: Console, client: Client, job: dict[str, Any], training_file: str, results: Path) -> None:
    console.rule("Where it is, and the same by hand")
    data_dir = client.key_file.parent
    console.print(
        f"""Model:   {job["fine_tuned_model"]}
Folder:  {results / "model"}
Report:  {results / "report.md"}

Start the demo's service again, with its pair, files and jobs in it:

  SHADOWFT_DATA_DIR={data_dir} SHADOWFT_MODEL_ROOTS={data_dir.parent / "pair"} make serve

and do the same by hand:

  KEY=$(cat {client.key_file})
  curl http://127.0.0.1:8000/v1/files -H "Authorization: Bearer $KEY" -F purpose=fine-tune -F file=@train.jsonl
  curl http://127.0.0.1:8000/v1/fine_tuning/jobs -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\
       -d '{{"model": "{job["model"]}", "training_file": "{training_file}"}}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=open("{client.key_file}").read().strip())
  file = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")
  job = client.fine_tuning.jobs.create(model="{job["model"]}", training_file=file.id)
  print(client.fine_tuning.jobs.retrieve(job.id).status)
""",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
