"""Why a run is not where it should be: one ranked list of causes with evidence and way out. Pure, over a snapshot."""
