"""Two models that answer together, evaluated like one: OSE, VRF, DaWin."""
