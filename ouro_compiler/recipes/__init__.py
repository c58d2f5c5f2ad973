"""Recipes: which sites, which quantizers, which search. One file a method."""
