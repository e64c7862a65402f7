"""How seeds are trained and judged, and the stage that does both beside its host."""
