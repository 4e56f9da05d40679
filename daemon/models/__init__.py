"""Models on disk: conversion to a Hugging Face directory, configuration, checkpoint, tokenizer and chat template."""
