"""How likely is a completion? The torch code that scores, trains and evaluates."""
