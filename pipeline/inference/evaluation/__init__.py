"""`megabase evaluate`: bits per base of a trained model on held-out windows, by what may explain them."""
