"""The papers' claims under test: what is compared (`design`); the claims as rows of runs (`papers`, `masks`, `compute`,
all of them in `plan`); one run and its masks (`run`, `schedules`); what a step costs (`costs`); the file of results
(`records`); and from there to differences (`judge`), verdicts (`verdicts`), curves (`curves`), plots (`plots`), what a
step costs in tables (`costs_report`) and the texts that a reader wants first (`reader`).
"""
