"""Ensembles of two models, evaluated like one model: OSE, VRF, DaWin."""
