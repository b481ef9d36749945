//! The phases as commands: load, run, write.

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use train::distill::{self, Distillation};
use train::draft::Drafting;
use train::error::{Error, Result};
use train::export::{self, Form};
use train::recipe::Recipe;
use train::{
    data, export_draft, files, generate as answers_of, sample, sparsify as slices, weights,
};

use crate::Paths;

pub(crate) fn sparsify(recipe: &Recipe, paths: &Paths, teacher: &Path) -> Result<()> {
    let device = distill::device(&recipe.device)?;
    let dense = weights::load(teacher, device, false)?;
    let settings = &recipe.sparsify;
    let corpus = data::Corpus::open(&paths.corpus, &settings.domains, settings.length, 0)?;
    let calibration = corpus.batch(0, recipe.calibration_rows, device);
    let tokens = calibration.tokens.narrow(1, 0, settings.length as i64);
    let start = Instant::now();
    let student = slices::sparsify(&dense, &recipe.slices, &tokens);
    println!(
        "sliced in {:.1} s; sliding {:?}",
        start.elapsed().as_secs_f64(),
        student.shape.sliding
    );
    let mut run = Distillation::new(student, &dense, settings, &paths.corpus)?;
    let names: Vec<&str> = settings.domains.iter().map(|d| d.name.as_str()).collect();
    let before = distill::perplexity(
        &dense,
        &paths.corpus,
        &names,
        settings.length,
        settings.eval_rows,
    )?;
    println!("{}", json!({"teacher_perplexity": before}));
    run.run(&paths.out, &paths.corpus, paths.resume)?;
    export::write(
        &run.student,
        &paths.out.join("model"),
        Form::Master,
        teacher,
    )
}

pub(crate) fn qat(recipe: &Recipe, paths: &Paths, teacher: &Path, student: &Path) -> Result<()> {
    let device = distill::device(&recipe.device)?;
    let dense = weights::load(teacher, device, false)?;
    let student = weights::load(student, device, true)?;
    let mut run = Distillation::new(student, &dense, &recipe.qat, &paths.corpus)?;
    run.run(&paths.out, &paths.corpus, paths.resume)?;
    let form = if recipe.qat.mxfp4 {
        Form::Quantized
    } else {
        Form::Master
    };
    export::write(&run.student, &paths.out.join("model"), form, teacher)?;
    if form == Form::Master {
        // The control of QAT: what rounding costs a student that never saw it.
        run.student.quantize(true, true);
        let line = json!({"rounded": true, "perplexity": run.evaluate(&paths.corpus)?});
        println!("{line}");
        files::write_json(&paths.out.join("rounded.json"), &line)?;
    }
    Ok(())
}

pub(crate) fn generate(recipe: &Recipe, paths: &Paths, model: &Path) -> Result<()> {
    let device = distill::device(&recipe.device)?;
    let net = weights::load(model, device, false)?;
    let answers = answers_of::generate(&net, &recipe.generate, &paths.corpus.join("prompts.json"))?;
    files::write(&paths.out.join("answers.bin"), &sample::encode(&answers))?;
    files::write(
        &paths.out.join("answers.u16"),
        &answers_of::stream(&answers),
    )
}

fn read_answers(path: &Path) -> Result<Vec<sample::Answer>> {
    sample::decode(&files::read(path)?)
        .ok_or_else(|| Error::Invalid(format!("{}: cut short", path.display())))
}

pub(crate) fn draft(
    recipe: &Recipe,
    paths: &Paths,
    model: &Path,
    answers: &Path,
    unseen: Option<&Path>,
) -> Result<()> {
    let device = distill::device(&recipe.device)?;
    let net = weights::load(model, device, false)?;
    let mut run = Drafting::new(&net, &recipe.draft, read_answers(answers)?)?;
    if let Some(path) = unseen {
        run.unseen = read_answers(path)?;
    }
    run.run(&paths.out, &recipe.generate.domains, paths.resume)?;
    let settings = &recipe.draft;
    export_draft::write(
        &run.drafter,
        &paths.out.join("dflash"),
        settings.gamma,
        settings.anchors,
    )
}

/// Conversations of a corpus as answers, cut to `length_max` tokens.
pub(crate) fn conversations(
    corpus: &Path,
    out: &Path,
    domains: &[String],
    answers_max: usize,
    length_max: usize,
) -> Result<()> {
    let mut all = Vec::new();
    for (index, name) in domains.iter().enumerate() {
        let tokens = data::read_tokens(&corpus.join(format!("{name}.u16")))?;
        let found = answers_of::conversations(&tokens, index as u16, length_max);
        all.extend(found.into_iter().take(answers_max));
    }
    println!("{} conversations", all.len());
    files::write(out, &sample::encode(&all))
}

pub(crate) fn eval(recipe: &Recipe, paths: &Paths, model: &Path, rounded: bool) -> Result<()> {
    let device = distill::device(&recipe.device)?;
    let mut net = weights::load(model, device, false)?;
    if rounded {
        net.quantize(true, true);
    }
    let settings = &recipe.qat;
    let names: Vec<&str> = settings.domains.iter().map(|d| d.name.as_str()).collect();
    let found = distill::perplexity(
        &net,
        &paths.corpus,
        &names,
        settings.length,
        settings.eval_rows,
    )?;
    let line =
        json!({"model": model.display().to_string(), "rounded": rounded, "perplexity": found});
    println!("{line}");
    files::write_json(&paths.out.join("perplexity.json"), &line)
}
