"""Write a small synthetic data set of Chinese marriage-and-family sentences.

The real data set (CAIL2019, "divorce") is its owners' and isn't shipped. This is a stand-in of the
same form with the same 20 labels, so that the project can be tried offline:

    python data/make_sample.py                      # writes data/{train,dev,data,label}.txt
    python data/make_sample.py --output_dir small --num_train 200 --num_dev 50

All is built from the hand-written clauses below; no person, case or court in it is real. The same
arguments give the same bytes on every machine.
"""

import argparse
import os
import random
import re
import sys
import tempfile
from itertools import accumulate

LABELS = (
    "婚后有子女 限制行为能力子女抚养 有夫妻共同财产 支付抚养费 不动产分割 婚后分居 二次起诉离婚 "
    "按月给付抚养费 准予离婚 有夫妻共同债务 婚前个人财产 法定离婚 不履行家庭义务 存在非婚生子 "
    "适当帮助 不履行离婚协议 损害赔偿 感情不和分居满二年 子女随非抚养权人生活 婚后个人财产"
).split()

# One block a theme, in the order in which a record tells things:
#     @name weight labels > themes that may follow in the same sample : clauses
# White space separates clauses; [a|b|] picks one, {slot} is a fact of the case, a leading # marks a
# numbered item of an operative part. The labels of a clause are exactly those of its block. A block
# named "-x" is a hard negative: it speaks of a label's subject but denies it, so it has no label,
# and the labels in its head are those it would contradict in the same sample.
TEMPLATES = """
@intro 0 : 婚后[双方|]常因[家庭琐事|性格差异|经济问题][争吵|发生口角|吵闹打架]
双方系[自由恋爱|同乡|同事]，{marry}[领取结婚证|登记结婚] {W}经人介绍相识，于{marry}[办理|]登记结婚
{P}为支持其主张，提交了[结婚证|身份证复印件|村委会证明] [婚前|双方婚前]缺乏了解，草率结婚
{D}经[本院|]合法传唤，无正当理由[拒不|未]到庭 {W}对[登记|相识]的事实无异议
@kids 14 婚后有子女 > custody sep again property debt monthly : {son}的降生[也|]没能缓和双方的矛盾
结婚[多年|{years}]，[又|并]有了共同的[孩子|{son}]，[应当|可以][互相谅解|好好沟通]
{W}共同生育了[两|三]个孩子，[最小的|大的]今年[刚满|已经]{age}岁
{K}的[出生医学证明|户口簿]，证明{W}生育一{g} {W}已有{son}{K}，[应|理应]珍惜[现有|]家庭
[婚后|]于{born}[共同|]生育一{g}，取名{K} {born}{W}生育一{g}{K}，[现|今年]{age}岁
@grown 3 婚后有子女 > sep again property house debt : 双方[所生的|]子女[均|都]已[成家|长大成人]
婚后[育有|生有]两{g}，大的叫{K}，小的叫{K2}，均已[成年|参加工作]
{born}{W}生育一{g}{K}，现[已成年|在外地工作|读大学]
@-kids 0 婚后有子女 限制行为能力子女抚养 支付抚养费 : 因{P}未能怀孕，双方[渐生|产生]矛盾
{W}婚后[一直|]未生育子女
@bastard 1.3 存在非婚生子 > neglect sep again damages : [经|]亲子鉴定，{K}与{P}无[血缘|亲子]关系
{D}[婚后|在外]与[他人|婚外异性]同居，并[于{born}|]生[下|育]一{g} {P}[后来|偶然]发现{K}并非自己亲生
{D}婚前与[他人|前男友]未婚生育一{g}{K} {K}系{D}与第三者所生的非婚生{g} {W}未婚同居生一{g}{K}
{D}在外育有一私生{g}
@-bastard 0 存在非婚生子 : {P}怀疑{D}在外[另有私生子|与人生子]，没有证据
{D}否认与[他人|婚外异性]生育[子女|孩子]
@neglect 2.7 不履行家庭义务 > sep again kids debt : {D}[挣的钱全部|将工资都用于]个人挥霍，不给家用
{D}[好逸恶劳|沉迷赌博|整日打牌|酗酒成性]，对[家庭|老人]不管不顾 {D}[长期|]未尽家庭责任
家里的[生活费|开销][全由|都靠]{P}一人承担，{D}分文不出 {D}[从不|拒绝|很少]承担家庭[开支|责任|义务]
{D}[离家|外出]后从未[寄钱回家|过问家中生活] {P}手术[住院|]期间，{D}[既|]不照顾也不给钱
@-neglect 0 不履行家庭义务 : {D}[一直|始终]照顾老人，并非不[顾家|尽家庭义务]
{P}称{D}不承担家庭责任，[与事实不符|没有证据]
@sep 6 婚后分居 > kids again again property grant : 双方分居[未满|尚不满]二年，[尚有|仍有]和好可能
{W}{left}开始分床[、分灶|]，互不往来，[已|现]分居[数月|半年|近一年] {left}起{W}分居[生活|]
{P}[回娘家居住|搬出另住]，{W}分居至今[不足两年|才几个月|已有半年]
[因|由于]工作[原因|关系]，双方[一直|长期]两地分居，并非感情不和
分居期间，双方[互不联系|很少来往|仍时有争吵] {P}于{left}搬到[单位宿舍|父母家]，与{D}分居
@sep2 1.3 婚后分居 感情不和分居满二年 > kids again grant : 感情不和，双方分居已经满二年
{W}因感情不和[自{left2}起|]分居[已满|超过][二年|两年] {left2}起{W}因感情不和分居[至今]，长达{years}
@sep2only 1 感情不和分居满二年 > kids again grant : {D}出走{years}，从未与{P}联系，感情名存实亡
{D}于{left2}离家[出走|]，已逾{years}未归，[下落不明|杳无音讯] {D}因夫妻不和离家[已满|超过]二年
双方感情不和，互不履行夫妻义务已[满两年|达{years}]
@-sep 0 婚后分居 感情不和分居满二年 : 双方[现]仍[在一起|共同]居住，[不存在|没有]分居[的事实|情况]
{P}主张[双方|]分居满二年，但未能举证，[本院|]不予采信
@again 7 二次起诉离婚 > kids sep sep grant property : 这[已|]是{P}第[二|三]次起诉[要求|]离婚
{P}曾于{sued}[向|诉至]法院[要求|起诉]离婚，后[撤回起诉|撤诉] {sued}法院[曾|]判决不准{W}离婚
[判决|判]不准离婚后，{W}关系[未|仍未]改善，{P}[再次|又]起诉 {sued}{D}也[曾|]提起过离婚之诉
[撤诉|上次判决]后满六个月，{P}再次[诉请|请求]离婚 法院[前次|]未准许离婚，{W}仍[未能和好|形同陌路]
@-again 0 二次起诉离婚 : [双方|]曾[多次|]协商[协议|]离婚，未[提起诉讼|诉至法院]
{P}[系|是]首次[起诉|诉请]离婚 此前{W}从未[起诉|诉讼]离婚
@grant 3.8 准予离婚 > kids sep again custody : 双方[均|都]认可感情[确已|]破裂，[应当准许|准许]离婚
[调解无效|无和好可能]，{P}[诉请|要求]离婚，[应予准许|予以支持] 夫妻感情[确已|已经]破裂，应准予离婚
{W}感情已破裂，对{P}的离婚请求，本院[予以|依法]支持 {D}同意离婚，本院准许
@grantlaw 2.8 准予离婚 法定离婚 > custody monthly property house before : #解除{P}与{D}的婚姻关系
依照婚姻法第三十二条，[准予|准许]{P}与{D}离婚 #准予{P}与{D}离婚 #准许{P}与{D}离婚
@law 1.3 法定离婚 > custodyonly debt houseonly : 人民法院[出具|制作]的离婚调解书[已|]发生法律效力
双方已[经{sued}|于{sued}][由|经]法院[判决|调解]离婚，[文书|]已生效 {W}已[经调解|经判决]离婚
{sued}{W}经法院判决离婚后，因财产问题再起纠纷 {sued}双方的婚姻关系[经法院|依法]解除
@-grant 0 准予离婚 法定离婚 限制行为能力子女抚养 支付抚养费 : #不[准予|准许|准]{P}与{D}离婚
夫妻感情尚未[完全|]破裂，{P}要求离婚，[本院|]不予[支持|准许] 请求[法院|依法]判令{W}离婚
@custody 14 婚后有子女 限制行为能力子女抚养 > kids property again grantlaw lump :
离婚后{son}{K}一直[按约|依照协议]由{X}抚养，并未[变更|改变] 婚生{g}{K}[现|]随{X}[共同|]生活
#长{g}{K}由{P}抚养，次{g}{K2}由{D}抚养[，互不给付抚养费|] 婚生{g}{K}[由|一直由]{X}抚养
{son}{K}由{X}抚养，[不要求|无需]{Y}[支付|负担]抚养费 #婚生{g}{K}由{X}[直接|]抚养[成年|至十八周岁|]
{X}要求抚养{son}{K}，{Y}[对此|当庭]表示[同意|反对] 婚生{g}{K}[已|]满十周岁，[本人|]表示愿意跟{X}生活
双方[均|都]要求[直接|]抚养[婚生子女|{son}{K}] #婚生{g}{K}由{X}抚养，{Y}每月可探望[一|两]次
@custodyonly 4.5 限制行为能力子女抚养 > support property : 小孩[现|一直]由{X}[带养|照看|抚养]
{X}[有固定工作|收入稳定]，具备抚养未成年[孩子|人]的[条件|能力] #继{g}{K}由[其生母|其生父]自行抚养
关于[小孩|孩子]的抚养，应以有利于未成年人[成长|身心健康]为原则 请求将[抚养权|抚养关系]变更给{X}
{X}[长期在外|体弱多病]，不[宜|适合]抚养孩子 养{g}{K}[今后|]由{X}继续抚养
@astray 2 婚后有子女 限制行为能力子女抚养 子女随非抚养权人生活 > support :
{son}{K}离婚后[并未|没有]跟随有抚养权的{X}，而是住在{Y}家中
协议[虽|]约定{son}{K}随{X}，[离婚后|事实上]却由{Y}抚养 抚养权虽归{X}，双方的{son}{K}实际生活在{Y}处
离婚时约定婚生{g}{K}由{X}抚养，但[实际|]一直随{Y}生活 {son}{K}判归{X}抚养，{X}将其交给{Y}[抚养|照看]
@bastardcustody 1 存在非婚生子 限制行为能力子女抚养 > support : #双方同居期间所生{g}{K}由{X}抚养
{W}未婚同居生下的{son}{K}尚幼，应由{X}[直接|继续]抚养 {D}与他人所生之{g}{K}由{D}自行[抚养|带养]
非婚生{g}{K}[由{X}抚养|随{X}生活]，{Y}[没有|未提]异议
@monthly 6 婚后有子女 限制行为能力子女抚养 支付抚养费 按月给付抚养费 > property grantlaw house :
#婚生{g}{K}由{X}抚养，{Y}[每月|按月]支付抚养费{fee}元[，至其年满十八周岁止|]
请求[判令|]婚生{g}{K}由{X}抚养，{Y}[按月|每月]负担[生活费|抚养费]{fee}元
{son}{K}由{X}抚养，{Y}于每月[底|{n}日前]支付抚育费{fee}元
婚生{g}{K}随{X}生活，{Y}每月给付{fee}元抚养费
@monthlyonly 1.3 支付抚养费 按月给付抚养费 > custodyonly : 抚养费[按|以]每月{fee}元[计算|的标准给付]
#{Y}自判决生效次月起每月{n}日前给付抚养费{fee}元 抚养费[增加|提高]到每月{fee}元
@lump 2 婚后有子女 限制行为能力子女抚养 支付抚养费 > property grantlaw :
双方{son}{K}由{X}抚养，[教育费、医疗费|抚养费]由{Y}承担[一半|百分之五十]
婚生{g}{K}随{X}生活，{Y}应[依法|]支付[相应的|]抚养费 #婚生{g}{K}由{X}抚养，{Y}一次性支付抚养费{sum}
{X}抚养{son}{K}，{Y}已预付全部抚养费{sum}
@support 3 支付抚养费 > custodyonly property : {Y}[至今|一直]未[支付|给付]抚养费，[共|累计]拖欠{sum}
#{Y}于判决生效后[十|三十]日内[支付|付清][拖欠的|]抚养费{sum} {Y}[应当|有义务]支付[必要的|]抚养费
[小孩|孩子]的[学费|教育费、医疗费]凭票据由{W}各负担一半 {Y}已一次性付清抚养费{sum}
@property 10 有夫妻共同财产 > kids debt custody house : 婚姻关系存续期间的{goods}[应|]属夫妻共同财产
#登记在{X}名下的{car}归{X}所有，[由{X}|]补偿{Y}{sum} 双方婚后[购买|买下]{car}一辆，[由|现由]{X}使用
{X}名下[的|]银行存款{sum}系婚后所得，应[平均|]分割 婚后[积攒|攒下]存款{sum}，由{X}保管
{P}要求[依法|]分割[夫妻|]共同财产 {X}在某公司的股份系夫妻共同财产 婚后[共同|]购置了{goods}[等|]
#共同财产{goods}归{X}所有 {W}共同财产有{goods}
@house 6.5 有夫妻共同财产 不动产分割 > debt kids custody grantlaw : #{place}夫妻共有房屋双方各半
婚后[购买|按揭购买]位于{place}的[商品房|房屋]一套，[要求|请求][依法|]分割
双方共有的{place}[房产|住房]归{X}，{X}[补偿|支付]{Y}房屋折价款{sum}
婚后[共同|]建造的[楼房|平房]{n}间，[双方|]各分一半 #[共有的|共同财产]{place}房屋一套归{X}所有
@houseonly 2.8 不动产分割 > debt kids : {place}的宅基地及房屋登记在{X}[父亲|母亲]名下，{P}要求分割
{place}的[房屋|门面房]归{X}所有，[剩余|未还]按揭由{X}承担 #坐落于{place}的房屋归{X}所有
{W}对{place}房屋[产权|份额]的分割[有争议|达成一致] 该[房屋|老宅]拆迁所得安置房[由|应由]双方分割
@-property 0 有夫妻共同财产 不动产分割 婚前个人财产 婚后个人财产 :
该房屋系{X}父母所有，[不属于|并非]夫妻共同财产 {W}均[陈述|认可]无[夫妻|]共同财产[需要分割|]
{X}主张{goods}系[婚前|个人]财产，没有证据
@before 2.6 婚前个人财产 > property house debt grantlaw : #{X}的[婚前|陪嫁|嫁妆]财产{goods}归{X}所有
位于{place}的[房屋|商品房]系{X}婚前[全款|出资|]购买，属其个人财产 婚前{X}购置了{goods}
{goods}系{X}[婚前|结婚前][购买|所购]，归[其|{X}]个人所有 {P}要求[取回|返还]婚前[个人|]财产{goods}
{X}婚前[已有|持有]的存款{sum}属个人财产 {X}的嫁妆有{goods}，现[存放|]在{Y}处
@after 1.8 婚后个人财产 > property debt : {X}[父母|祖父]遗嘱[明确|]只留给{X}的[存款|房屋]，归其个人
婚后{X}[父母|父亲]赠与并[声明|指明]归{X}一人所有的{goods}，[属|系]其个人财产
{X}婚后[因交通事故|受伤]所得的[残疾|伤残]赔偿金{sum}，归其个人所有
{X}[婚后|]继承的遗产[明确|]归其个人所有 #各自名下的[存款|住房公积金]归各自所有
双方书面约定婚后[各自|]所得归各自所有 #{X}的个人[衣物|生活用品]归{X}所有
@debt 5.5 有夫妻共同债务 > property house kids lump : #[所欠|欠]某银行的购房贷款{sum}由{X}负责偿还
[因|为][建房|经营生意|看病]向[亲友|信用社]借款{sum}，[系|属]夫妻共同债务
{X}[名下|经手]的信用卡透支{sum}，用于家庭[日常|]开支，双方共同负担 双方确认[婚后|]有共同债务{sum}
婚姻关系存续期间[共同|]欠[外债|银行贷款]{sum}[，至今未还|] #共同债务{sum}由{W}各[半|承担一半]
@-debt 0 有夫妻共同债务 : {P}主张的债务{sum}，[仅有借条|证据不足]，不认定为共同债务
{D}[赌博|挥霍]所欠{sum}系其个人债务[，与{P}无关|] {W}无[夫妻|]共同债[务|权债务]
@agreement 1.8 不履行离婚协议 > houseonly support : {D}未按离婚协议[的约定|]办理[过户|产权变更]手续
离婚协议[签订|生效]后，{D}[未按约|拒绝|迟迟不]支付[补偿款|剩余款项]{sum}
{D}[仅|只]履行了离婚协议的部分内容，[尚欠|余款]{sum}[未付|拒付] [多次|]催要后，{D}仍不按离婚协议付款
离婚协议约定的{goods}，{D}[至今拒不交付|一直不肯交出] 离婚时{D}承诺给付{sum}，[至今|期满后]分文未付
{D}[违反|违背]离婚协议，[不肯|拒绝]交付{car} {D}拒不履行离婚协议[约定的义务|]
@-agreement 0 不履行离婚协议 : 离婚协议约定的[款项|义务]{D}已[全部|按期][付清|履行完毕]
@help 1.8 适当帮助 > custody grantlaw property : #{Y}[一次性|]给付{X}[经济|生活]帮助[款|费|金]{sum}
[考虑|鉴于]{X}[无房居住|丧失劳动能力]，[酌情|酌定]由{Y}[适当|]帮助{sum} {Y}自愿补助{X}{sum}
{X}[身患重病|没有收入]，离婚后生活困难，{Y}应给予[适当|]经济帮助
{X}生活[确有|]困难，请求{Y}[给予|适当]经济帮助 {X}没有住处，{Y}应[给予|提供][适当|必要的]帮助
@-help 0 适当帮助 : {X}有[稳定收入|住房]，不属于生活困难，经济帮助不予支持 {X}不要求经济帮助
@damages 1.8 损害赔偿 > custody property grant : {P}要求{D}[支付|赔偿][精神损失费|精神抚慰金]{sum}
{D}的[过错|不忠]行为给{P}造成[极大|]伤害，应赔偿[精神|]损失{sum}
{D}[实施家暴|与他人同居|重婚]，应[承担|支付]损害赔偿{sum} 因{D}[殴打|虐待|遗弃]，{P}请求损害赔偿
#{D}[赔偿|支付]{P}[精神|]损害[赔偿|抚慰]金{sum} {P}[作为|系]无过错方，有权[请求|主张]损害赔偿
@-damages 0 损害赔偿 : [精神|]损害赔偿请求因{P}未能证明{D}有过错，不予支持
{P}[当庭|自愿]放弃[要求|]损害赔偿的[请求|主张]
@outro 0 : [以上|上述]事实有[结婚证|户口簿|当事人陈述]等[证据|]在案佐证 案件受理费{fee}元，由{P}负担
#案件受理费{fee}元，减半收取，由{D}[负担|承担] [其余|其他]请求，[双方|]可另行[解决|主张权利]
[故|为此]{P}诉至法院，请求依法[裁判|处理] [本院|]对[此|上述事实]予以确认 #驳回{P}的其他诉讼请求
"""

GOODS = (
    "电视机一台 冰箱一台 洗衣机一台 空调两台 沙发一套 双人床一张 衣柜一个 摩托车一辆 电动车一辆 "
    "电脑一台 金项链一条 金戒指一枚 被子六床 餐桌一张 梳妆台一个 热水器一台"
).split()
PLACES = "城关镇 河东镇 新城区 某某县 幸福小区 东风路 人民路 某某村 滨江花园 北门街".split()
# Slots drawn anew each time; the others stay the same throughout one sample.
FREE_SLOTS = {
    "n": [str(n) for n in range(2, 16)],
    "fee": [f"{n}00" for n in range(3, 13)],
    "sum": [f"{n}{unit}元" for n in range(2, 61) for unit in ("万", "00", "000", "000")],
    "goods": ["、".join(GOODS[i : i + n]) for i in range(len(GOODS) - 2) for n in (1, 2, 3)],
    "W": ["双方", "双方", "原、被告"],
    "car": ["小型轿车", "面包车", "二手货车", "越野车", "白色轿车"],
    "place": [place + number for place in PLACES for number in ("", "", "5号", "12号", "36号")],
}
SURNAMES = "王李张刘陈杨赵黄周吴徐孙马朱胡林郭何高罗郑梁谢宋唐许韩冯邓曹"
COURT = "经审理查明， 本院认为， 另查明， 综上， 本院经审查认为，".split()
PARTIES = "原告诉称， 被告辩称， 庭审中， 原告陈述： 被告答辩称， 此外， 原告{p}诉称：".split()
LEADS = "判决如下： 本院判决： 据此，判决： 经调解，双方达成如下协议： 双方协议约定：".split()
# Labels that two clauses of one sample may share: 生育一子, and then who brings him up.
REPEATABLE = {"婚后有子女", "有夫妻共同财产"}

EMPTY_SHARE = 0.03  # samples without any label
LONG_SHARE = 0.06  # samples of six clauses: most of them longer than 126 characters
MORE_SHARE = 0.6  # chance of a further clause
FOLLOW_SHARE, DENIED_SHARE = 0.45, 0.1  # kinds of further clauses; the rest has no label


def make_facts(rng):
    """Return {slot: [wordings]}: the people and dates of one case."""

    def date(year):
        month, day = rng.randint(1, 12), rng.randint(1, 28)
        return [rng.choice([f"{year}年{month}月", f"{year}年{month}月{day}日", "××××年××月××日"])]

    p, d = (rng.choice(SURNAMES) + rng.choice(["某", "某某", "某甲", "×", "××"]) for _ in "pd")
    sides = [["原告", f"原告{p}"], ["被告", f"被告{d}"]]
    x = rng.randrange(2)  # X is the side that keeps the child or the thing, Y the other one
    family, (g, son) = rng.choice([p, d])[0], rng.choice([("子", "儿子"), ("女", "女儿")])
    now = rng.randint(2012, 2019)
    marry = now - rng.randint(4, 24)
    facts = {"p": [p], "P": sides[0], "D": sides[1], "X": sides[x], "Y": sides[1 - x]}
    facts |= {"g": [g], "son": [son], "K": [family + rng.choice(["某乙", "某1", "小某"])]}
    facts |= {"K2": [family + "某丙"], "age": [rng.choice("23456789"), rng.choice("三四五六七八")]}
    facts |= {"marry": date(marry), "born": date(rng.randint(marry + 1, now - 2))}
    facts |= {"left": date(now - 1) + [f"{now}年初", f"{now}年春节后"], "sued": date(now - 1)}
    facts |= {"left2": date(now - rng.randint(3, 4)), "years": [rng.choice("三四五") + "年"]}
    return facts | FREE_SLOTS


def fill(rng, facts, template):
    """Choose one way at every [a|b], innermost first, then fill the slots."""
    while "[" in template:
        template = re.sub(r"\[([^][]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    return re.sub(r"\{(\w+)\}", lambda m: rng.choice(facts[m[1]]), template)


class Theme:
    """One block of TEMPLATES."""

    def __init__(self, order, block):
        head, _, clauses = block.partition(" :")
        head, _, follow = head.partition(">")
        self.name, weight, *labels = head.split()
        self.order, self.weight = order, float(weight)
        self.labels = set() if self.name[0] == "-" else set(labels)
        self.forbidden = set(labels) - self.labels
        self.follow, self.clauses = follow.split(), clauses.split()

    def clashes(self, other):
        """Whether this cannot stand beside `other`: the same thing settled twice, or denied."""
        return bool(self.forbidden & other.labels or self.labels & other.labels - REPEATABLE)


def choose_themes(rng, themes, first):
    """Return `first` and the themes told with it, in the order of a record."""
    long = rng.random() < LONG_SHARE
    chosen = [first, *(themes[name] for name in ("intro", "outro") if long and first.labels)]
    denied = [name for name in themes if name[0] == "-"]
    for _ in range(12 if long else 3):
        if len(chosen) == 6 or not (long or rng.random() < MORE_SHARE):
            break
        kind = rng.random() if first.labels else 1.0
        names = ["intro", "outro"]
        if kind < FOLLOW_SHARE + DENIED_SHARE:
            names = first.follow if kind < FOLLOW_SHARE else denied
        theme = themes[rng.choice(names)]
        if not any(theme is t or theme.clashes(t) or t.clashes(theme) for t in chosen):
            chosen.append(theme)
    return sorted(chosen, key=lambda theme: theme.order)


def make_sample(rng, themes, first):
    """Return (text, labels joined in the order of label.txt)."""
    facts, chosen = make_facts(rng), choose_themes(rng, themes, first)
    clauses = [fill(rng, facts, rng.choice(theme.clauses)) for theme in chosen]
    told = [clause for clause in clauses if clause[0] != "#"]
    items = [clause[1:] for clause in clauses if clause[0] == "#"]
    text = "".join(clause + rng.choice("。。；，，") for clause in told)[:-1]
    if told and rng.random() < 0.45:
        court = re.search("本院|不予|予以|准许|准予", text)  # a party cannot say these
        text = fill(rng, facts, rng.choice(COURT if court else COURT + PARTIES)) + text
    if told and items:
        ruling = re.search("判决|驳回|准|受理费", "".join(items))  # no part of an agreement
        text += "。" + rng.choice(LEADS[:3] if ruling else LEADS)
    digits = rng.choice(["一二三四五六七八", "一二三四五六七八", "12345678"])
    start = 0 if told or len(items) > 1 else rng.randrange(5)
    text += "；".join(f"{digits[start + i]}、{item}" for i, item in enumerate(items))
    labels = set().union(*(theme.labels for theme in chosen))
    return text + rng.choice("。。。；"), ",".join(label for label in LABELS if label in labels)


def make_split(rng, themes, count, seen):
    """Return `count` samples whose texts are not in `seen`, and add their texts to it."""
    # First themes are dealt out at even steps of the summed weights rather than drawn, so that
    # the rare labels get their share in a small split too.
    labelled = [theme for theme in themes.values() if theme.labels]
    empty = [theme for theme in themes.values() if not theme.labels]
    steps = list(accumulate(theme.weight for theme in labelled))
    samples, full = [], count - round(count * EMPTY_SHARE)
    for i in range(count):
        place = (i + 0.5) / full * steps[-1]
        first = labelled[sum(step <= place for step in steps)] if i < full else rng.choice(empty)
        while (sample := make_sample(rng, themes, first))[0] in seen:
            pass
        seen.add(sample[0])
        samples.append(sample)
    rng.shuffle(samples)
    return samples


def write_files(output_dir, contents):
    """Write {name: text}. All are complete in a folder beside the targets before the first takes
    its place, so a full disk leaves the old set as it was."""
    os.makedirs(output_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sample.", dir=output_dir) as waiting:
        for name, content in contents.items():
            with open(os.path.join(waiting, name), "w", encoding="utf-8", newline="\n") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
        for name in contents:
            os.replace(os.path.join(waiting, name), os.path.join(output_dir, name))


def parse_args(argv=None):
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=style)
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--output_dir", default=here, help="folder to write the files to")
    parser.add_argument("--seed", type=int, default=3, help="seed of every random choice")
    for name, count in (("train", 2000), ("dev", 400), ("data", 40)):
        parser.add_argument(f"--num_{name}", type=int, default=count, help=f"lines of {name}.txt")
    args = parser.parse_args(argv)
    if min(args.num_train, args.num_dev, args.num_data) < 1:
        parser.error("--num_train, --num_dev and --num_data must be at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    rng, seen = random.Random(args.seed), set()
    blocks = [Theme(order, block) for order, block in enumerate(TEMPLATES.split("@")[1:])]
    themes = {theme.name: theme for theme in blocks}
    contents = {"label.txt": "".join(f"{label}\n" for label in LABELS)}
    for name, count in (("train", args.num_train), ("dev", args.num_dev), ("data", args.num_data)):
        line = "{0}\n" if name == "data" else "{0}\t{1}\n"
        split = make_split(rng, themes, count, seen)
        contents[f"{name}.txt"] = "".join(line.format(*sample) for sample in split)
    try:
        write_files(args.output_dir, contents)
    except OSError as error:
        print(f"{args.output_dir}: cannot write the data set: {error}", file=sys.stderr)
        sys.exit(2)
    for name, content in contents.items():
        print(f"{os.path.join(args.output_dir, name)}: {len(content.splitlines())} lines")


if __name__ == "__main__":
    main()
