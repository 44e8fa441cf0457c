"""Averages of models before any weight is read: ingredients, checks, names, configuration."""
