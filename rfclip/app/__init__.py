"""What people run: the command line, the page in the browser, the files they write and the workers behind them."""
