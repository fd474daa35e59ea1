from rfclip.cli import app

app()
