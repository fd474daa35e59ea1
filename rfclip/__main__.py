from rfclip.app.cli import app

app()
