"""Tests of dlgbench."""
