"""`python -m sp_fast`: the `sp-fast` program from a checkout that is not installed."""

from sp_fast.cli import app

app(prog_name="sp-fast")
