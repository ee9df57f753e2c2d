"""Public data sets: conversion from their own formats to folders with pairs, see `training.datasets.__main__`."""
