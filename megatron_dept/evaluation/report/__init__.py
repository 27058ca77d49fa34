"""From run directories to one page: every figure and table of a comparison of methods, and the numbers behind them."""
